"""Wording of error messages about recipes: what a key takes, which key was meant, a value in short."""

from __future__ import annotations

import difflib
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from omnimem.errors import is_valid_text
from omnimem.recipe.schema import GROUPS, KEY_TYPES

WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
LISTS = {
    str: "a list of names such as [a,b]",
    float: "a list of numbers such as [0.9,0.99]",
    int: "a list of whole numbers such as [64,1024]",
}


def describe_type(hint: Any) -> str:
    """Say which values a type takes."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is list:
        return LISTS[get_args(hint)[0]]
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(describe_type(member) for member in get_args(hint))
    return WORDS[hint]


def show_value(value: Any) -> str:
    """Show a value as it is written in a recipe, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return shorten(ascii(value) if isinstance(value, str) and not is_valid_text(value) else repr(value))


def shorten(text: str) -> str:
    """Cut a long text."""
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def first_line(error: BaseException) -> str:
    """First line of an exception's message, shortened."""
    return shorten((str(error).splitlines() or [type(error).__name__])[0])


def suggest_key(key: str) -> str:
    """Name the nearest key of the same group, or keys of that name in other groups, else what there is."""
    group, _, last = key.rpartition(".")
    names: dict[str, list[str]] = {}
    for known in KEY_TYPES:
        names.setdefault(known.rpartition(".")[2], []).append(known)
    siblings = [known.rpartition(".")[2] for known in KEY_TYPES if group and known.startswith(f"{group}.")]
    if last in names:
        near = names[last]
    elif siblings:
        near = [f"{group}.{name}" for name in difflib.get_close_matches(last, siblings, n=1)]
    else:
        near = difflib.get_close_matches(key, [*KEY_TYPES, *GROUPS], n=1)
        near = near or [names[name][0] for name in difflib.get_close_matches(last, names, n=1)]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    if siblings:
        return f"; {group} has {', '.join(siblings)}"
    return f"; a recipe has {', '.join([name for name in names if name in KEY_TYPES] + sorted(GROUPS))}"

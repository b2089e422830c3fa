"""The reference of all recipe keys in recipes/README.md, generated from the schema and its comments.

python -m omnimem.recipe.reference          # print it
python -m omnimem.recipe.reference --write  # update recipes/README.md
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omnimem.files import atomic_write_text
from omnimem.option_names import option_name
from omnimem.recipe.parser import RECIPES
from omnimem.recipe.schema import Recipe

README = RECIPES / "README.md"
BEGIN, END = "<!-- begin of the generated reference -->", "<!-- end of the generated reference -->"


def reference() -> str:
    """Markdown with one table per group of keys: key, type, default, meaning."""
    hints = get_type_hints(Recipe)
    groups = [entry for entry in fields(Recipe) if is_dataclass(hints[entry.name])]
    parts = [_table("Keys of the run", Recipe, "")]
    for group in groups:
        config: Any = hints[group.name]
        parts.append(_table(f"`{group.name}`: {_description(config)}", config, f"{group.name}."))
    return "\n".join(parts)


def update(text: str) -> str:
    """Return the README `text` with the present reference between its markers."""
    above, rest = text.split(BEGIN)
    return f"{above}{BEGIN}\n\n{reference()}\n{END}{rest.split(END)[1]}"


def comments(config: type) -> dict[str, str]:
    """Comment of every field of a dataclass: at the end of its line, or on the lines directly above it."""
    found, above = {}, []
    for line in inspect.getsource(config).splitlines():
        code, _, comment = (part.strip() for part in line.partition("# "))
        if not code:
            above = [*above, comment] if comment else []
            continue
        name, colon, _ = code.partition(":")
        if colon and name.isidentifier():
            found[name] = " ".join([*above, comment]).strip()
        above = []
    return found


def _table(title: str, config: type, prefix: str) -> str:
    hints, meaning = get_type_hints(config), comments(config)
    rows = [
        f"| `{prefix}{option_name(entry.name)}` | {_type(hints[entry.name])} | {_default(entry)} "
        f"| {meaning[entry.name]} |"
        for entry in fields(config)
        if not is_dataclass(hints[entry.name])
    ]
    return "\n".join([f"### {title}\n", "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _description(config: type) -> str:
    text = (config.__doc__ or "").split("\n")[0]
    return (text[0].lower() + text[1:]).rstrip(".")


def _type(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is list:
        return f"list of {_type(get_args(hint)[0])}"
    if get_origin(hint) in (Union, UnionType):
        members = [member for member in get_args(hint) if member is not NoneType]
        optional = [" or null"] if NoneType in get_args(hint) else []
        return "".join([" or ".join(map(_type, members)), *optional])
    return {str: "text", int: "int", float: "float", bool: "bool"}[hint]


def _default(entry: Field[Any]) -> str:
    value = entry.default if entry.default_factory is MISSING else entry.default_factory()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return f"{value:g}" if isinstance(value, float) else f"{value}" if value != "" else "empty"


def main(argv: list[str]) -> int:
    """Print the reference, or write it into recipes/README.md."""
    if argv == ["--write"]:
        atomic_write_text(README, update(README.read_text(encoding="utf-8")))
        return 0
    if argv:
        print("usage: python -m omnimem.recipe.reference [--write]", file=sys.stderr)
        return 2
    print(reference())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Read recipe files and ``key=value`` arguments into a `Recipe`.

OmegaConf checks keys and types. Every mistake is one `OmniMemError` line that names the key and the values it takes.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, ValidationError

from omnimem.errors import OmniMemError, is_valid_text
from omnimem.recipe.checks import validate
from omnimem.recipe.messages import describe_type, first_line, shorten, show_value, suggest_key
from omnimem.recipe.schema import GROUPS, KEY_TYPES, Recipe, field_of

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
"""Folder of the recipes that ship with the package."""

SIZES = ("memory.gib", "memory.mean_budget")
"""Keys of which one says how large the memory is."""


def load_recipe(args: list[str]) -> Recipe:
    """Read `recipe=NAME-or-path` and apply the other `key=value` arguments; the last value of a key wins.

    Values are parsed as YAML (`true`, `2e-5`, `[a, b]`, `null`), except for keys that hold text: their values are
    taken literally, so that a question may contain a colon.

    Raises
    ------
    OmniMemError
        No recipe or an unknown one, an unknown key, a value of the wrong type or out of range, broken YAML.
    """
    pairs = [_split_argument(arg) for arg in args]
    names = [text for key, text in pairs if key == "recipe"]
    if not names or not names[-1]:
        raise OmniMemError(f"no recipe given; pass recipe=NAME, one of: {', '.join(list_recipes())}")
    path = _find_recipe(names[-1])

    config = OmegaConf.structured(Recipe(recipe=names[-1]))
    for key, value in _read_yaml(path).items():
        _assign(config, str(key), value, where=f"{path}: ")
    given = {key: _parse_value(key, text) for key, text in pairs if key != "recipe"}
    for key, value in given.items():
        _assign(config, key, value)
    _replace_alternatives(config, given)
    try:
        recipe = cast(Recipe, OmegaConf.to_object(config))
    except MissingMandatoryValue as error:
        raise OmniMemError(f"{error.full_key} has no value yet (???); pass {error.full_key}=...") from error
    except OmegaConfBaseException as error:  # a reference ${...} to a key that does not exist
        raise OmniMemError(f"{error.full_key}: {first_line(error)}") from error

    recipe.output_dir = recipe.output_dir or f"runs/{path.stem}"
    validate(recipe)
    return recipe


def _replace_alternatives(config: DictConfig, given: dict[str, Any]) -> None:
    """A size of the memory given as an argument replaces one of the recipe file in the other unit."""
    for key, other in (SIZES, SIZES[::-1]):
        if given.get(key) is not None and other not in given:
            _assign(config, other, None)


def list_recipes() -> list[str]:
    """Names of the recipes in the repository, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_summary(name: str) -> str:
    """First sentence of a recipe's header, after the launch line."""
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()[1:])
    return re.split(r"(?<=[.;]) ", " ".join(line.strip("# ") for line in head).strip())[0].rstrip(".;")


def _split_argument(arg: str) -> tuple[str, str]:
    if not is_valid_text(arg):
        raise OmniMemError(f"argument {arg!a} is not valid UTF-8 text")
    key, equals, text = arg.partition("=")
    if equals:
        return key.strip(), text.strip()
    hint = f"recipe={arg}" if arg in list_recipes() else "train.max_steps=100"
    raise OmniMemError(f"argument {arg!r} is not of the form key=value, such as {hint}")


def _find_recipe(name: str) -> Path:
    """Return the file of a recipe name, or of a path (a name that ends in .yaml or .yml, or contains a folder)."""
    names = list_recipes()
    path = Path(os.path.expanduser(name))
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        # `os.path` treats a name that is too long as missing; `Path` raises.
        if os.path.isfile(path):
            return path
        problem = f"recipe file {shorten(name)} " + ("is not a file" if os.path.exists(path) else "does not exist")
    elif name in names:
        return RECIPES / f"{name}.yaml"
    else:
        problem = f"unknown recipe {show_value(name)}"
    near = difflib.get_close_matches(path.stem, names, n=1)
    hint = f"did you mean recipe={near[0]}? " if near else ""
    raise OmniMemError(f"{problem}; {hint}recipes: {', '.join(names)}, or a path to a YAML file")


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        loaded = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise OmniMemError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except RecursionError as error:
        raise OmniMemError(f"{path}: too deeply nested; a recipe has groups of keys and lists of values") from error
    except (yaml.YAMLError, ValueError) as error:  # also: not UTF-8, more digits than Python reads
        raise OmniMemError(f"{path}: not valid YAML: {first_line(error)}") from error
    except OSError as error:
        # For a file with a single plain value OmegaConf raises an OSError without an errno.
        reason = error.strerror or "a recipe is a mapping of keys to values"
        raise OmniMemError(f"{path}: {reason}") from error
    if not isinstance(loaded, DictConfig):
        raise OmniMemError(f"{path}: a recipe is a mapping of keys to values, this is a list")
    return cast(dict[Any, Any], OmegaConf.to_container(loaded, resolve=False))


def _parse_value(key: str, text: str) -> Any:
    """Parse the value of a command line argument."""
    if text == "null" or not text:
        return None
    if _holds_text(KEY_TYPES.get(key)):
        return text
    try:
        value = OmegaConf.from_dotlist([f"value={text}"])
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        takes = describe_type(KEY_TYPES[key]) if key in KEY_TYPES else "something else"
        raise OmniMemError(f"{key} takes {takes}, cannot read {show_value(text)}") from error
    return cast(dict[str, Any], OmegaConf.to_container(value, resolve=False))["value"]


def _assign(config: DictConfig, key: str, value: Any, where: str = "") -> None:
    """Set one key, or every key of a group, in `config`."""
    if key in GROUPS:
        if not isinstance(value, dict):
            example = next(known for known in KEY_TYPES if known.startswith(f"{key}."))
            raise OmniMemError(f"{where}{key} is a group of keys such as {example}, got {show_value(value)}")
        for name, entry in value.items():
            _assign(config, f"{key}.{name}", entry, where)
        return
    if key not in KEY_TYPES:
        raise OmniMemError(f"{where}unknown key {key}{suggest_key(key)}")
    hint = KEY_TYPES[key]
    if isinstance(value, dict):
        raise OmniMemError(f"{where}{key} takes {describe_type(hint)}, got {show_value(value)}")
    try:
        if isinstance(value, int) and not isinstance(value, bool) and set(get_args(hint)) == {str, float}:
            value = float(value)  # OmegaConf does not convert an int for a union with float
        OmegaConf.update(config, field_of(key), value)
    except (ValidationError, OverflowError) as error:
        raise OmniMemError(f"{where}{key} takes {describe_type(hint)}, got {show_value(value)}") from error
    except OmegaConfBaseException as error:
        raise OmniMemError(f"{where}{key}: {first_line(error)}") from error


def _holds_text(hint: Any) -> bool:
    """Whether all values of a type are text."""
    if get_origin(hint) is Literal:
        return True
    members = set(get_args(hint)) - {type(None)}
    return hint is str or (get_origin(hint) in (Union, UnionType) and all(map(_holds_text, members)))

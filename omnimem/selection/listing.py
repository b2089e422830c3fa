"""The table that `omnimem methods` prints: every selection method with its options and their defaults."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import Any

from omnimem.option_names import option_name
from omnimem.selection import SELECTION_METHODS, options_of
from omnimem.selection.omnimem import VARIANTS


def print_methods() -> None:
    """Print each method's name, what it keeps, and its options as ``key=default``."""
    width = max(map(len, SELECTION_METHODS))
    for name, method in SELECTION_METHODS.items():
        print(f"{name:<{width}}  {(method.__doc__ or '').splitlines()[0]}")
        print(f"{'':<{width}}  {', '.join(f'{key}={value}' for key, value in default_options(name).items())}")
    print(
        f"\nIn a recipe: selection.method=NAME selection.OPTION=VALUE. Values shown for omnimem are those of "
        f"variant=paper; variant=release changes {', '.join(_changed_by_release())}."
    )


def default_options(name: str) -> dict[str, Any]:
    """Options of a method with their defaults, `position_ids` last."""
    signature = inspect.signature(SELECTION_METHODS[name]).parameters
    defaults = {key: parameter.default for key, parameter in signature.items() if key != "overrides"}
    if "variant" in defaults:
        defaults |= asdict(VARIANTS[defaults["variant"]])
    defaults = {option_name(key): value for key, value in defaults.items()}
    defaults["position_ids"] = SELECTION_METHODS[name]().position_ids
    assert set(defaults) == options_of(name)
    return defaults


def _changed_by_release() -> list[str]:
    paper, release = asdict(VARIANTS["paper"]), asdict(VARIANTS["release"])
    return [f"{key} to {release[key]}" for key in paper if paper[key] != release[key]]

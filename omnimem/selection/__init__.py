"""Which positions stay: one file a method. `SELECTION_METHODS` lists them by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from omnimem.errors import OmniMemError
from omnimem.selection.base import Candidates, SelectionMethod
from omnimem.selection.full import Full
from omnimem.selection.omnimem import VARIANTS, OmniMem, OmniMemSettings
from omnimem.selection.random import Random
from omnimem.selection.uniform import Uniform

SELECTION_METHODS: dict[str, Callable[..., SelectionMethod]] = {
    "full": Full,
    "uniform": Uniform,
    "random": Random,
    "omnimem": OmniMem,
}
"""Selection methods by the name used in recipes, profiles and on the command line."""


def build_selection(name: str, **options: Any) -> SelectionMethod:
    """Make a selection method.

    Parameters
    ----------
    name : str
        Key of `SELECTION_METHODS`.
    **options
        Hyper-parameters of the method.

    Raises
    ------
    OmniMemError
        Unknown method, option or variant.
    """
    known = options_of(name)
    for key in options:
        if key not in known:
            raise OmniMemError(f"selection method {name!r} has no option {key!r}{_nearest(key, known)}")
    if "variant" in known and options.get("variant", "paper") not in VARIANTS:
        raise OmniMemError(f"unknown variant {options['variant']!r}{_nearest(options['variant'], VARIANTS)}")
    return SELECTION_METHODS[name](**options)


def options_of(name: str) -> set[str]:
    """Hyper-parameters a method takes.

    Raises
    ------
    OmniMemError
        Unknown method.
    """
    if name not in SELECTION_METHODS:
        raise OmniMemError(f"unknown selection method {name!r}{_nearest(name, SELECTION_METHODS)}")
    known = set(inspect.signature(SELECTION_METHODS[name]).parameters)
    if "overrides" in known:
        known = (known - {"overrides"}) | {option.name for option in fields(OmniMemSettings)}
    return known


def _nearest(word: str, known: Any) -> str:
    names = sorted(known)
    close = get_close_matches(str(word), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f" (known: {', '.join(names) or 'none'}){hint}"


__all__ = ["SELECTION_METHODS", "Candidates", "OmniMem", "SelectionMethod", "build_selection", "options_of"]

"""Which tokens are retained: one file per method. `SELECTION_METHODS` lists them by name. See README.md."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, get_args

from omnimem.errors import OmniMemError
from omnimem.option_names import option_name, parameter_name
from omnimem.selection.attention_only import AttentionOnly
from omnimem.selection.base import AttentionScoreSpec, Candidates, PositionIdPolicy, Probe, SelectionMethod
from omnimem.selection.dms import DMS
from omnimem.selection.full import Full
from omnimem.selection.h2o import H2O
from omnimem.selection.heads import HeadMethod
from omnimem.selection.hermes import Hermes, HermesReleased
from omnimem.selection.infinipot_v import InfiniPotV, InfiniPotVReleased
from omnimem.selection.kvzap import KVzap
from omnimem.selection.learned import Learned
from omnimem.selection.novelty import Novelty
from omnimem.selection.omnimem import VARIANTS, OmniMem, OmniMemSettings
from omnimem.selection.random import Random
from omnimem.selection.similarity_only import SimilarityOnly
from omnimem.selection.snapkv import SnapKV
from omnimem.selection.streaming_llm import StreamingLLM
from omnimem.selection.streammem import StreamMem
from omnimem.selection.trim_kv import TrimKV
from omnimem.selection.uniform import Uniform

SELECTION_METHODS: dict[str, Callable[..., SelectionMethod]] = {
    "full": Full,
    "uniform": Uniform,
    "random": Random,
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "snapkv": SnapKV,
    "infinipot_v": InfiniPotV,
    "infinipot_v_released": InfiniPotVReleased,
    "streammem": StreamMem,
    "hermes": Hermes,
    "hermes_released": HermesReleased,
    "attention_only": AttentionOnly,
    "similarity_only": SimilarityOnly,
    "omnimem": OmniMem,
    "novelty": Novelty,
    "learned": Learned,
    "dms": DMS,
    "trim_kv": TrimKV,
    "kvzap": KVzap,
}
"""Selection methods by the name used in recipes, profiles and on the command line."""


def build_selection(name: str, position_ids: PositionIdPolicy | None = None, **options: Any) -> SelectionMethod:
    """Make a selection method.

    Parameters
    ----------
    name : str
        Key of `SELECTION_METHODS`.
    position_ids : {"original", "compact"}, optional
        Position ids of retained tokens; the method's own choice when left out.
    **options
        Hyper-parameters of the method. λ is `lambda` in recipes and profiles and `lambda_` in Python.

    Raises
    ------
    OmniMemError
        Unknown method, option or variant.
    """
    known = options_of(name)
    options = {option_name(key): value for key, value in options.items()}
    for key in options:
        if key not in known:
            raise OmniMemError(f"selection method {name!r} has no option {key!r}{_nearest(key, known)}")
    if "variant" in known and options.get("variant", "paper") not in VARIANTS:
        raise OmniMemError(f"unknown variant {options['variant']!r}{_nearest(options['variant'], VARIANTS)}")
    method = SELECTION_METHODS[name](**{parameter_name(key): value for key, value in options.items()})
    if position_ids is not None:
        if position_ids not in get_args(PositionIdPolicy):
            hint = _nearest(position_ids, get_args(PositionIdPolicy))
            raise OmniMemError(f"unknown position_ids policy {position_ids!r}{hint}")
        method.position_ids = position_ids
    return method


def untrained_methods() -> list[str]:
    """Names of the methods that need no trained heads."""
    return [
        name
        for name, method in SELECTION_METHODS.items()
        if not (isinstance(method, type) and issubclass(method, HeadMethod))
    ]


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
    return {option_name(parameter) for parameter in known} | {"position_ids"}


def _nearest(word: str, known: Any) -> str:
    names = sorted(known)
    close = get_close_matches(str(word), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f" (known: {', '.join(names) or 'none'}){hint}"


__all__ = [
    "SELECTION_METHODS",
    "AttentionScoreSpec",
    "Candidates",
    "OmniMem",
    "Probe",
    "SelectionMethod",
    "build_selection",
    "options_of",
    "untrained_methods",
]

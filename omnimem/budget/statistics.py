"""Calibration statistics of every layer, as recorded in a budget profile.

`omnimem.calibrate` measures them, `omnimem.budget.allocation` turns them into budgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from reprlib import repr as short
from typing import Any

from omnimem.errors import OmniMemError

METHOD = "avba"
"""Name of the allocation method that uses these statistics."""


@dataclass(frozen=True)
class Compressibility:
    """Compressibility (the paper's name; high means hard to compress) of visual, audio or all tokens of a layer.

    Attributes
    ----------
    entropy : float
        Entropy of the attention scores of the group, divided by log K: 0 (one token has all) to 1 (uniform).
    redundancy : float
        Mean redundancy s̄ of the group: 1 if all tokens repeat their neighbours.
    count : float
        Mean number K of tokens.
    """

    entropy: float
    redundancy: float
    count: float

    @property
    def value(self) -> float:
        """C = normalised entropy · (1 − redundancy); 0 for a group that did not occur."""
        return self.entropy * max(0.0, 1 - self.redundancy)


@dataclass(frozen=True)
class LayerStatistics:
    """Compressibility of a layer's visual tokens, its audio tokens, and both together."""

    visual: Compressibility
    audio: Compressibility
    both: Compressibility


@dataclass(frozen=True)
class Calibration:
    """Statistics of all layers, and the parameters with which `omnimem.budget.allocation.allocate` used them."""

    layers: tuple[LayerStatistics, ...]
    ratio: float
    temperature: float
    floor: int

    @classmethod
    def from_dict(cls, statistics: Mapping[str, Any], layers: int) -> Calibration:
        """Read the ``statistics`` of a calibrated profile.

        Parameters
        ----------
        statistics : mapping
            JSON object with ``ratio``, ``temperature``, ``floor`` and, under ``layers``, a `LayerStatistics` each.
        layers : int
            Number of layers of the profile.

        Raises
        ------
        OmniMemError
            A field is missing or not a number, or the number of layers differs.
        """
        measured = statistics.get("layers")
        if not isinstance(measured, list) or len(measured) != layers:
            raise OmniMemError(f"statistics: layers must be a list of {layers}, one for each layer of the profile")
        floor = statistics.get("floor")
        if not isinstance(floor, int):
            raise OmniMemError(f"statistics: floor must be a whole number, got {short(floor)}")
        return cls(
            layers=tuple(_layer(layer, f"statistics: layer {index}") for index, layer in enumerate(measured)),
            ratio=_number(statistics, "ratio", "statistics"),
            temperature=_number(statistics, "temperature", "statistics"),
            floor=floor,
        )


def _layer(content: Any, place: str) -> LayerStatistics:
    groups = {}
    for group in fields(LayerStatistics):
        found = content.get(group.name) if isinstance(content, dict) else None
        if not isinstance(found, dict):
            raise OmniMemError(f"{place} must be an object of {', '.join(one.name for one in fields(LayerStatistics))}")
        names = [one.name for one in fields(Compressibility)]
        groups[group.name] = Compressibility(*(_number(found, name, f"{place}, {group.name}") for name in names))
    return LayerStatistics(**groups)


def _number(content: Mapping[str, Any], name: str, place: str) -> float:
    value = content.get(name)
    # Unlike `math.isfinite`, the comparison accepts integers of any size.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise OmniMemError(f"{place}: {name} must be a number, got {short(value)}")
    return value

"""The contract of a selection method: which of a layer's positions stay.

A method is one small class in one file. It declares what it needs to observe (`mass_kind`, `stores_features`) and
computes one score per candidate; the memory keeps the best of each modality up to the layer's budget
(`omnimem.selection.topk`). Only what is declared is computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from omnimem.budget import LayerBudget

if TYPE_CHECKING:
    from omnimem.memory.table import PositionTable


MassKind = Literal["heads", "concat"]
"""Kinds of attention mass, see `omnimem.memory.attention.attention_mass`."""


@dataclass(frozen=True)
class Candidates:
    """What a method may look at: the retained and new positions of one layer, in stream order.

    Attributes
    ----------
    layer : int
        Number of the layer.
    budget : LayerBudget
        Visual and audio positions that will stay.
    keys, values : Tensor
        ``[B, G, N, D]`` post-RoPE keys, values.
    table : PositionTable
        Index in the stream, rotary position, time, modality, validity of each candidate.
    mass : Tensor or None
        ``[B, N]`` accumulated attention mass (float32) if the method declared a `mass_kind`.
    features : Tensor or None
        ``[B, N, F]`` what `SelectionMethod.features` made of the layer's input hidden states.
    """

    layer: int
    budget: LayerBudget
    keys: Tensor
    values: Tensor
    table: PositionTable
    mass: Tensor | None
    features: Tensor | None


class SelectionMethod(ABC):
    """Scores candidates; the highest scores of each modality stay.

    Attributes
    ----------
    mass_kind : MassKind or None
        Attention mass the method wants.
    mass_stride : int
        1: from every query of a chunk; above: from every so many-th (cheaper, approximate).
    stores_features : bool
        Whether `features` of every position are kept in the memory.
    keeps_everything : bool
        Whether budgets are ignored.
    """

    mass_kind: MassKind | None = None
    mass_stride: int = 1
    stores_features: bool = False
    keeps_everything: ClassVar[bool] = False

    @abstractmethod
    def score(self, candidates: Candidates) -> Tensor:
        """Score ``[B, N]`` of every candidate; larger stays, ties go to the more recent."""

    def accumulate(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Combine the mass ``[B, N]`` so far with that of this chunk ``[B, N + T]``; the sum unless overridden."""
        total = new.clone()
        if old is not None:
            total[:, : old.shape[1]] += old
        return total

    def features(self, hidden: Tensor, layer: int) -> Tensor:
        """What to keep of the layer's input hidden states ``[B, T, C]``."""
        raise NotImplementedError(f"{type(self).__name__} stores no features")

    def settings(self) -> dict[str, Any]:
        """Hyper-parameters, as recorded in budget profiles."""
        return {}


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Scores are float32 (float64 for float64 models): in bf16 a few percent of a kept set would change."""
    return torch.promote_types(tensor.dtype, torch.float32)

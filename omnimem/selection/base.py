"""The contract of a selection method: which of a layer's positions stay.

A method is one small class in one file. It declares what it needs (attention mass, probes, hidden states, keys) and
computes one score per candidate; the memory keeps the best of each modality up to the layer's budget
(`omnimem.selection.topk`). Only what is declared is computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from omnimem.budget import LayerBudget
from omnimem.selection.topk import keep_mask

if TYPE_CHECKING:
    from omnimem.memory.table import TokenMetadata


AttentionScoreKind = Literal["heads", "kv_heads", "concat"]
"""Kinds of attention mass, see `omnimem.memory.attention.attention_scores`."""

ProbeScope = Literal["causal", "all", "memory"]
"""What a probe's softmax goes over, see `omnimem.memory.attention.probe_attention`."""

PositionIdPolicy = Literal["original", "compact"]
"""Rotary ids of retained positions: those they came with, or numbered densely anew after every compression."""


@dataclass(frozen=True)
class AttentionScoreSpec:
    """Attention mass a method wants; the fields are arguments of `omnimem.memory.attention.attention_scores`.

    Attributes
    ----------
    kind : AttentionScoreKind
        How heads are combined.
    stride : int
        1: from every query of a chunk; above: from every so many-th (cheaper, approximate).
    window : int or None
        Only from the last so many queries of a chunk.
    """

    kind: AttentionScoreKind = "heads"
    stride: int = 1
    window: int | None = None


@dataclass(frozen=True)
class Probe:
    """A text whose attention is measured after every chunk and which then is forgotten.

    Attributes
    ----------
    text : str
        What is asked.
    turn : bool
        Whether the text ends the user's turn and opens the assistant's, as a question does.
    attends : ProbeScope
        What its softmax goes over.
    propagates : bool
        Whether the probe runs through the model. If not, every layer is shown the token embeddings.
    """

    text: str
    turn: bool = False
    attends: ProbeScope = "causal"
    propagates: bool = True


@dataclass(frozen=True)
class Candidates:
    """What a method may look at: the retained and new positions of one layer, in stored order.

    R is the number of rows: one a sample, or under `SelectionMethod.per_head` one a sample and key-value head; G is
    then 1.

    Attributes
    ----------
    layer, layers : int
        Number of the layer, and how many there are.
    budget : LayerBudget
        Visual and audio positions that will stay.
    old : int
        How many of the N were there at the last compression; the others are new.
    values : Tensor
        ``[R, G, N, D]``.
    keys : Tensor or None
        ``[R, G, N, D]`` post-RoPE, if the method `reads_keys`.
    table : TokenMetadata
        Index in the stream, rotary position, time, modality, validity of each candidate.
    mass : Tensor or None
        ``[R, N]`` accumulated attention mass (float32) if the method declared `mass`.
    probes : tuple of Tensor
        ``[R, N]`` mean attention of each of the method's `probes`.
    features : Tensor or None
        ``[R, N, F]`` what `SelectionMethod.features` made of the layer's input hidden states.
    """

    layer: int
    layers: int
    budget: LayerBudget
    old: int
    values: Tensor
    keys: Tensor | None
    metadata: TokenMetadata
    attention_scores: Tensor | None
    probes: tuple[Tensor, ...]
    features: Tensor | None


class MergedTokens(NamedTuple):
    """Positions a method makes out of others; they count towards the budget.

    Keys are averaged without their rotation and rotated to the new position's id.

    Attributes
    ----------
    into : Tensor
        int64 ``[R, N]``: into which of the S new positions a candidate flows, -1 for none.
    weight : Tensor
        ``[R, N]``: its share; the shares of a new position sum to 1.
    table : TokenMetadata
        Facts of the new positions ``[R, S]``; ``index`` is -1 minus that of the first candidate inside.
    """

    into: Tensor
    weight: Tensor
    metadata: TokenMetadata


class SelectionMethod(ABC):
    """Scores candidates; the highest scores of each modality stay.

    Attributes
    ----------
    mass : AttentionScoreSpec or None
        Attention mass the method wants.
    probes : tuple of Probe
        Texts whose attention to the memory the method wants.
    stores_features : bool
        Whether `features` of every position are kept in the memory.
    reads_keys : bool
        Whether the post-RoPE keys are wanted.
    per_head : bool
        Whether every key-value head keeps its own positions; such a method stores no features.
    keeps_everything : bool
        Whether budgets are ignored.
    positions : Positions
        Rotary ids of what stays.
    differentiable : bool
        Whether scores are differentiable in what they are computed from.
    """

    attention_scores: AttentionScoreSpec | None = None
    probes: tuple[Probe, ...] = ()
    stores_features: bool = False
    reads_keys: bool = False
    per_head: ClassVar[bool] = False
    keeps_everything: ClassVar[bool] = False
    position_ids: PositionIdPolicy = "original"
    differentiable: bool = False

    @abstractmethod
    def score(self, candidates: Candidates) -> Tensor:
        """Score ``[R, N]`` of every candidate; larger stays, ties go to the more recent."""

    def scores(self, layers: Iterable[Candidates]) -> Iterator[tuple[Candidates, Tensor]]:
        """Candidates and score of every layer, first layer first; for methods whose layers look at each other."""
        return ((candidates, self.score(candidates)) for candidates in layers)

    def choose(self, candidates: Candidates, score: Tensor) -> tuple[Tensor, MergedTokens | None]:
        """Turn scores into what stays: bool ``[R, N]``, and what is made of the rest, if anything."""
        return keep_mask(score, candidates.metadata, candidates.budget), None

    def accumulate(self, old: Tensor, new: Tensor) -> Tensor:
        """Combine the mass ``[R, M]`` so far with that of this chunk ``[R, N]``, N ≥ M; the sum unless overridden."""
        total = new.clone()
        total[:, : old.shape[1]] += old
        return total

    def features(self, hidden: Tensor, layer: int) -> Tensor:
        """What to keep of the layer's input hidden states ``[B, T, C]``."""
        raise NotImplementedError(f"{type(self).__name__} stores no features")

    def settings(self) -> dict[str, Any]:
        """The method's own hyper-parameters."""
        return {}

    def recorded(self) -> dict[str, Any]:
        """What `build_selection` needs besides the name to make the same method: what budget profiles record."""
        return {**self.settings(), "position_ids": self.position_ids}


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Scores are float32 (float64 for float64 models): in bf16 a few percent of a kept set would change."""
    return torch.promote_types(tensor.dtype, torch.float32)

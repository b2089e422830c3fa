"""The interface of a selection method: which tokens of a layer are retained.

A method is one small class in one file. It declares what it needs (attention scores, probes, hidden states, keys) and
computes one selection score per candidate; the cache retains the highest scores of each modality up to the layer's
budget (`omnimem.selection.topk`). Only what is declared is computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from omnimem.budget import LayerBudget
from omnimem.selection.feature_codec import FeatureCodec
from omnimem.selection.topk import keep_mask
from omnimem.token_metadata import TokenMetadata

EPSILON = 1e-12
"""Added inside logarithms of scores."""

AttentionScoreKind = Literal["heads", "kv_heads", "concat"]
"""How heads are combined, see `omnimem.memory.scores.attention_scores`."""

ProbeScope = Literal["causal", "all", "memory"]
"""Keys of a probe's softmax, see `omnimem.memory.scores.probe_attention`."""

PositionIdPolicy = Literal["original", "compact"]
"""Position ids of retained tokens: their original ones, or consecutive ones assigned after every compression."""


@dataclass(frozen=True)
class AttentionScoreSpec:
    """Attention scores a method needs; the fields are arguments of `omnimem.memory.scores.attention_scores`.

    Attributes
    ----------
    kind : AttentionScoreKind
        How heads are combined.
    stride : int
        1: from every query of a chunk; above: from every stride-th query (cheaper, approximate).
    window : int or None
        Only from the last `window` queries of a chunk.
    """

    kind: AttentionScoreKind = "heads"
    stride: int = 1
    window: int | None = None


@dataclass(frozen=True)
class Probe:
    """A text that runs after every chunk, to measure its attention to the stored tokens, and is then removed.

    Attributes
    ----------
    text : str
        The text.
    as_user_turn : bool
        Whether the text is a question: it ends the user's turn and opens the assistant's.
    softmax_over : ProbeScope
        Keys of its softmax.
    propagates : bool
        Whether its hidden states pass from layer to layer. If not, every layer is given the token embeddings.
    """

    text: str
    as_user_turn: bool = False
    softmax_over: ProbeScope = "causal"
    propagates: bool = True


@dataclass(frozen=True)
class Arrival:
    """New tokens of one layer before their forward pass, from which `SelectionMethod.features` computes what to store.

    Attributes
    ----------
    layer : int
        Number of the layer.
    hidden : Tensor
        ``[B, T, C]`` input hidden states of the new tokens.
    new : TokenMetadata
        Of the T new tokens.
    stored : callable
        Returns the features ``[B, N, F]`` of the stored tokens, decoded; None before the first.
    metadata : TokenMetadata or None
        Of the N stored tokens.
    """

    layer: int
    hidden: Tensor
    new: TokenMetadata
    stored: Callable[[], Tensor | None]
    metadata: TokenMetadata | None


@dataclass(frozen=True)
class Candidates:
    """Input of a selection method: the retained and new tokens of one layer, in stored order.

    R is the number of rows: one per sample, or under `SelectionMethod.per_head` one per sample and key-value head; G is
    then 1.

    Attributes
    ----------
    layer, num_layers : int
        Number of the layer, and how many there are.
    budget : LayerBudget
        Visual and audio tokens to retain.
    num_previous : int
        How many of the N tokens remained after the last compression; the others are new.
    values : Tensor or None
        ``[R, G, N, D]``, if the method `reads_values`. Where the cache encodes keys and values, both are there for
        `SelectionMethod.scores` alone, not for `SelectionMethod.select`.
    keys : Tensor or None
        ``[R, G, N, D]`` post-RoPE, if the method `reads_keys`.
    metadata : TokenMetadata
        Index in the stream, position ids, time, modality, validity of each candidate.
    attention_scores : Tensor or None
        ``[R, N]`` accumulated attention scores (float32) if the method declares `attention_scores`.
    probe_scores : tuple of Tensor
        ``[R, N]`` mean attention of each of the method's `probes`.
    features : Tensor or None
        ``[R, N, F]`` what `SelectionMethod.features` computed when each token arrived.
    """

    layer: int
    num_layers: int
    budget: LayerBudget
    num_previous: int
    values: Tensor | None
    keys: Tensor | None
    metadata: TokenMetadata
    attention_scores: Tensor | None
    probe_scores: tuple[Tensor, ...]
    features: Tensor | None


class MergedTokens(NamedTuple):
    """Tokens that a method merges from others; they count towards the budget.

    Keys are averaged without their rotation and rotated to the position id of the merged token.

    Attributes
    ----------
    into : Tensor
        int64 ``[R, N]``: which of the S merged tokens a candidate is merged into, -1 for none.
    weight : Tensor
        ``[R, N]``: its weight in the mean; the weights of a merged token sum to 1.
    metadata : TokenMetadata
        Of the merged tokens ``[R, S]``; ``index`` is -1 minus that of the first candidate merged into it.
    """

    into: Tensor
    weight: Tensor
    metadata: TokenMetadata


class SelectionMethod(ABC):
    """Scores candidates; the highest scores of each modality are retained.

    Attributes
    ----------
    attention_scores : AttentionScoreSpec or None
        Attention scores the method needs.
    probes : tuple of Probe
        Texts whose attention to the stored tokens the method needs.
    stores_features : bool
        Whether `features` of every token are stored.
    reads_keys, reads_values : bool
        Whether the method needs post-RoPE keys, and values; stored ones may have to be decoded for it.
    feature_codec : FeatureCodec or None
        How features are stored; None: as `features` returns them.
    per_head : bool
        Whether every key-value head retains its own tokens; such a method stores no features.
    keeps_everything : bool
        Whether budgets are ignored.
    position_ids : PositionIdPolicy
        Position ids of retained tokens.
    differentiable : bool
        Whether scores have a gradient with respect to what they are computed from.
    """

    attention_scores: AttentionScoreSpec | None = None
    probes: tuple[Probe, ...] = ()
    stores_features: bool = False
    feature_codec: FeatureCodec | None = None
    reads_keys: bool = False
    reads_values: bool = False
    per_head: ClassVar[bool] = False
    keeps_everything: ClassVar[bool] = False
    position_ids: PositionIdPolicy = "original"
    differentiable: bool = False

    @abstractmethod
    def score(self, candidates: Candidates) -> Tensor:
        """Score ``[R, N]`` of every candidate: higher scores are retained, ties go to the more recent token."""

    def scores(self, layers: Iterable[Candidates]) -> Iterator[tuple[Candidates, Tensor]]:
        """Candidates and score of every layer, first layer first; overridden where layers depend on each other."""
        return ((candidates, self.score(candidates)) for candidates in layers)

    def select(self, candidates: Candidates, score: Tensor) -> tuple[Tensor, MergedTokens | None]:
        """Retained tokens as a bool mask ``[R, N]``, and tokens merged from the others, if any."""
        return keep_mask(score, candidates.metadata, candidates.budget), None

    def accumulate(self, old: Tensor, new: Tensor) -> Tensor:
        """Combine the attention scores so far ``[R, M]`` with those of this chunk ``[R, N]``, N ≥ M; here their sum."""
        total = new.clone()
        total[:, : old.shape[1]] += old
        return total

    def features(self, arrival: Arrival) -> Tensor:
        """Features ``[B, T, F]`` to store of the new tokens of a layer."""
        raise NotImplementedError(f"{type(self).__name__} stores no features")

    def feature_nbytes(self, channels: int, dtype: torch.dtype) -> int:
        """Bytes that a token's features take as stored, for hidden states of C channels and this dtype.

        Methods without a `feature_codec` store the hidden states themselves, unless they override this.
        """
        if not self.stores_features:
            return 0
        codec = self.feature_codec
        return channels * dtype.itemsize if codec is None else codec.nbytes(compute_dtype(dtype))

    def settings(self) -> dict[str, Any]:
        """The method's own hyper-parameters."""
        return {}

    def recorded(self) -> dict[str, Any]:
        """Options with which `build_selection` makes the same method; budget profiles record them."""
        return {**self.settings(), "position_ids": self.position_ids}


def compute_dtype(given: Tensor | torch.dtype) -> torch.dtype:
    """Dtype of scores: float32 (float64 for float64 models); in bf16 a few percent of a retained set would change."""
    return torch.promote_types(given if isinstance(given, torch.dtype) else given.dtype, torch.float32)


def log_attention(candidates: Candidates) -> Tensor:
    """Log attention score ``[R, N]``; finite for a token without attention."""
    assert candidates.attention_scores is not None
    return torch.log(candidates.attention_scores + EPSILON)

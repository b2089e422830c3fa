"""OmniMem (arXiv 2606.07577): ψ = a^λ · (1 − s), attention score a times dissimilarity 1 − s to neighbouring tokens.

The paper and the released code differ in several switches; `variant` selects all of them at once:

====================  =====================  ==========================================
switch                paper                  release
====================  =====================  ==========================================
``factor``            ``linear``: 1 − s      ``sqrt``: √(1 − s)
``attention_scores``  ``heads``              ``concat``
``accumulation``      ``sum``                ``mean``: (old + new) / 2 at every chunk
``neighbours``        ``sequence``           ``sequence``
``redundancy``        ``hidden``             ``hidden``
``query_stride``       4 [ours]               1: every query
====================  =====================  ==========================================
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor

from omnimem.errors import OmniMemError
from omnimem.option_names import option_name
from omnimem.selection.base import (
    EPSILON,
    Arrival,
    AttentionScoreSpec,
    Candidates,
    SelectionMethod,
    compute_dtype,
    log_attention,
)
from omnimem.selection.feature_codec import FeatureCodec
from omnimem.selection.redundancy import redundancy
from omnimem.selection.sketch import sketch

STEEPEST = 1e-3
"""1 − s below which the gradient of its logarithm stops growing."""


@dataclass(frozen=True)
class OmniMemSettings:
    """Every switch of the method; `variant` gives the values of those left out.

    Attributes
    ----------
    lambda_ : float
        λ, exponent of the attention score (`lambda` in recipes and on the command line).
    factor : {"linear", "sqrt"}
        1 − s or √(1 − s).
    attention_scores : {"heads", "concat"}
        Mean over heads of their softmax, or one softmax over concatenated heads.
    accumulation : {"mean", "sum", "ema"}
        How the attention scores of retained tokens are combined with those of a new chunk.
    ema_decay : float
        Weight of the old scores under ``ema``.
    neighbours : {"sequence", "modality"}
        Neighbours in the merged sequence or within the same modality.
    redundancy : {"hidden", "sketch", "value", "key"}
        What the similarity is computed from.
    sketch_dim : int
        Numbers in a sketch (8 bit each).
    query_stride : int
        1: attention scores from every query of a chunk; above: from every stride-th. With 4, retained sets agree to
        99.9 % on a trained model (`tests/benchmarks/agreement.py`).
    seed : int
        Seed of the sketch's projection.
    """

    lambda_: float = 0.02
    factor: Literal["linear", "sqrt"] = "linear"
    attention_scores: Literal["heads", "concat"] = "heads"
    accumulation: Literal["mean", "sum", "ema"] = "sum"
    ema_decay: float = 0.9
    neighbours: Literal["sequence", "modality"] = "sequence"
    redundancy: Literal["hidden", "sketch", "value", "key"] = "hidden"
    sketch_dim: int = 128
    query_stride: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if choices and value not in choices:
                raise OmniMemError(f"selection omnimem: {name}={value!r}; use one of {', '.join(choices)}")
        for name, value, holds, rule in (
            ("lambda", self.lambda_, 0 <= self.lambda_ < math.inf, "a number of at least 0"),
            ("ema_decay", self.ema_decay, 0 <= self.ema_decay <= 1, "between 0 and 1"),
            ("sketch_dim", self.sketch_dim, self.sketch_dim >= 1, "at least 1"),
            ("query_stride", self.query_stride, self.query_stride >= 1, "at least 1"),
        ):
            if not holds:
                raise OmniMemError(f"selection omnimem: {name} must be {rule}, got {value!r}")


VARIANTS = {
    "paper": OmniMemSettings(),
    "release": OmniMemSettings(factor="sqrt", attention_scores="concat", accumulation="mean", query_stride=1),
}
"""Settings by the name of their source."""


class OmniMem(SelectionMethod):
    """ψ = a^λ · (1 − s): attention score a and dissimilarity 1 − s to neighbouring tokens.

    Parameters
    ----------
    variant : {"paper", "release"}
        Which source the defaults follow.
    **overrides
        Fields of `OmniMemSettings`.
    """

    def __init__(self, variant: str = "paper", **overrides: Any) -> None:
        self.variant = variant
        self.options = replace(VARIANTS[variant], **overrides)
        # With λ = 0 attention scores have no effect and are not measured.
        self.attention_scores = (
            AttentionScoreSpec(self.options.attention_scores, self.options.query_stride)
            if self.options.lambda_ > 0
            else None
        )
        self.stores_features = self.options.redundancy in ("hidden", "sketch")
        self.reads_keys = self.options.redundancy == "key"
        if self.options.redundancy == "sketch":
            self.feature_codec = FeatureCodec(0, self.options.sketch_dim)
        self.reads_values = self.options.redundancy == "value"
        self.differentiable = True

    def score(self, candidates: Candidates) -> Tensor:
        """Log ψ = λ·log a + log(1 − s), half of the second term under ``sqrt``."""
        options, table = self.options, candidates.metadata
        s = redundancy(self._similarity_input(candidates), table.modality, table.valid, options.neighbours)
        novelty = _log_novelty(1 - s)
        if options.factor == "sqrt":
            novelty = novelty / 2
        if candidates.attention_scores is None:
            return novelty
        return options.lambda_ * log_attention(candidates) + novelty

    def _similarity_input(self, candidates: Candidates) -> Tensor:
        source = {"value": candidates.values, "key": candidates.keys}.get(self.options.redundancy)
        features = candidates.features if source is None else source.transpose(1, 2).flatten(2)
        assert features is not None
        return features.to(compute_dtype(features) if features.is_floating_point() else torch.float32)

    def features(self, arrival: Arrival) -> Tensor:
        """The hidden states themselves, or their sketch."""
        if self.options.redundancy == "hidden":
            return arrival.hidden
        return sketch(arrival.hidden, self.options.sketch_dim, arrival.layer, self.options.seed)

    def accumulate(self, old: Tensor, new: Tensor) -> Tensor:
        """Sum, mean or exponential average for retained tokens; new tokens take the new score."""
        weight_old, weight_new = {
            "sum": (1.0, 1.0),
            "mean": (0.5, 0.5),
            "ema": (self.options.ema_decay, 1 - self.options.ema_decay),
        }[self.options.accumulation]
        total = new.clone()
        total[:, : old.shape[1]] = weight_old * old + weight_new * new[:, : old.shape[1]]
        return total

    def settings(self) -> dict[str, Any]:
        """Variant and every switch."""
        return {"variant": self.variant, **{option_name(key): value for key, value in asdict(self.options).items()}}


def _log_novelty(novelty: Tensor) -> Tensor:
    """log(1 − s) with its gradient bounded at `STEEPEST`: equal neighbours would have an infinite one."""
    value = torch.log(novelty.clamp_min(0) + EPSILON)
    if not novelty.requires_grad:
        return value
    slope = novelty / novelty.detach().clamp_min(STEEPEST)
    return value.detach() + (slope - slope.detach())

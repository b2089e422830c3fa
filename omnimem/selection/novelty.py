"""Novelty: retain tokens that repeat nothing that is retained or came earlier in their chunk [ours].

    x_k = log(1 − n_k + ε) + λ · log a_k        n_k = max_j cos(H_j, H_k)

over retained and earlier tokens j of the modality of k. ψ = a^λ · (1 − s) (arXiv 2606.07577) compares a token with its
two neighbours alone, so that copies of a fact at distant times are all retained; novelty retains one of them.

Stored per token are one number and a sketch of H; by default n_k is measured once, when the token arrives.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from omnimem.errors import OmniMemError
from omnimem.option_names import option_name
from omnimem.selection.base import Arrival, AttentionScoreSpec, Candidates, SelectionMethod, log_attention
from omnimem.selection.feature_codec import FeatureCodec
from omnimem.selection.sketch import largest_similarity, sketch

EPSILON = 1e-2
"""ε: an exact copy has the log novelty -4.6, which a learned head or attention can outweigh."""

Measured = Literal["arrival", "every_chunk"]
"""When n_k is measured: once, when the token arrives, or again over all candidates at every compression."""


@dataclass(frozen=True)
class NoveltySettings:
    """Settings of the novelty term.

    Attributes
    ----------
    novelty : {"arrival", "every_chunk"}
        See `Measured`.
    sketch_dim : int
        Numbers per sketch.
    sketch_bits : {8, 4}
        Bits per number.
    query_stride : int
        Where attention scores are used: 1 from every query of a chunk, above: from every stride-th.
    seed : int
        Seed of the sketch's projection.
    """

    novelty: Measured = "arrival"
    sketch_dim: int = 32
    sketch_bits: int = 8
    query_stride: int = 4
    seed: int = 0

    def check(self, method: str) -> None:
        """Raise `OmniMemError` if a value is not possible."""
        for name, value, holds, rule in (
            ("novelty", self.novelty, self.novelty in get_args(Measured), f"one of {', '.join(get_args(Measured))}"),
            ("sketch_dim", self.sketch_dim, self.sketch_dim >= 1, "at least 1"),
            ("sketch_bits", self.sketch_bits, self.sketch_bits in (4, 8), "4 or 8"),
            ("query_stride", self.query_stride, self.query_stride >= 1, "at least 1"),
        ):
            if not holds:
                raise OmniMemError(f"selection {method}: {name} must be {rule}, got {value!r}")


class Novelty(SelectionMethod):
    """Dissimilarity to everything retained, optionally weighted by attention; needs no training.

    Parameters
    ----------
    lambda_ : float
        λ, weight of the log attention score; 0: attention scores are not measured.
    novelty, sketch_dim, sketch_bits, query_stride, seed
        See `NoveltySettings`.
    """

    stores_features = True

    def __init__(
        self,
        lambda_: float = 0.0,
        novelty: Measured = "arrival",
        sketch_dim: int = 32,
        sketch_bits: int = 8,
        query_stride: int = 4,
        seed: int = 0,
    ) -> None:
        self.options = NoveltySettings(novelty, sketch_dim, sketch_bits, query_stride, seed)
        self.options.check("novelty")
        if not 0 <= lambda_ < math.inf:
            raise OmniMemError(f"selection novelty: lambda must be a number of at least 0, got {lambda_!r}")
        self.lambda_ = lambda_
        self.attention_scores = AttentionScoreSpec("heads", query_stride) if lambda_ > 0 else None

    @property
    def feature_codec(self) -> FeatureCodec:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Columns in full, sketches in `sketch_bits`."""
        return FeatureCodec(self.num_columns, self.options.sketch_dim, self.options.sketch_bits)

    @property
    def num_columns(self) -> int:
        """Numbers stored before the sketch."""
        return int(self.options.novelty == "arrival")

    def score(self, candidates: Candidates) -> Tensor:
        """Log novelty, plus λ times the log attention score."""
        assert candidates.features is not None
        arrival = self.options.novelty == "arrival"
        score = candidates.features[..., 0] if arrival else self.present_log_novelty(candidates)
        if candidates.attention_scores is None:
            return score
        return score + self.lambda_ * log_attention(candidates)

    def features(self, arrival: Arrival) -> Tensor:
        """Log novelty, if it is measured at arrival, then the sketch: ``[B, T, num_columns + sketch_dim]``."""
        log_novelty, sketches = self.measure(arrival)
        return torch.cat((log_novelty[..., None], sketches), -1)[..., 1 - self.num_columns :]

    @torch.no_grad()
    def measure(self, arrival: Arrival) -> tuple[Tensor, Tensor]:
        """Log novelty ``[B, T]`` of new tokens against what is stored, and their sketches ``[B, T, sketch_dim]``.

        Where novelty is measured at every compression instead, it is 0 here.
        """
        options = self.options
        sketches = sketch(arrival.hidden, options.sketch_dim, arrival.layer, options.seed, options.sketch_bits)
        if options.novelty == "every_chunk":
            return torch.zeros_like(sketches[..., 0]), sketches
        features = arrival.stored()
        stored = None if features is None else features[..., self.num_columns :]
        return _log_novelty(largest_similarity(sketches, arrival.new, stored, arrival.metadata)), sketches

    @torch.no_grad()
    def present_log_novelty(self, candidates: Candidates) -> Tensor:
        """Log novelty ``[R, N]`` of each candidate against the earlier ones."""
        assert candidates.features is not None
        return _log_novelty(largest_similarity(candidates.features[..., self.num_columns :], candidates.metadata))

    def settings(self) -> dict[str, Any]:
        """λ and the settings of the novelty term."""
        return {option_name("lambda_"): self.lambda_, **asdict(self.options)}


def _log_novelty(similarity: Tensor) -> Tensor:
    return (1 - similarity + EPSILON).log()

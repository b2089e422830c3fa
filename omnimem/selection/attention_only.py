"""Retain the tokens with the highest accumulated attention score, mean over heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from omnimem.errors import OmniMemError
from omnimem.selection.base import AttentionScoreSpec, Candidates, SelectionMethod


class AttentionOnly(SelectionMethod):
    """The accumulated attention score, mean over heads, alone: the a of ψ = a^λ · (1 − s).

    Parameters
    ----------
    query_stride : int
        1: exact attention scores; above: from every stride-th query of a chunk.
    """

    def __init__(self, query_stride: int = 1) -> None:
        if query_stride < 1:
            raise OmniMemError(f"selection attention_only: query_stride must be at least 1, got {query_stride}")
        self.attention_scores = AttentionScoreSpec("heads", query_stride)
        self.stride = query_stride

    def score(self, candidates: Candidates) -> Tensor:
        """Accumulated attention score."""
        assert candidates.attention_scores is not None
        return candidates.attention_scores

    def settings(self) -> dict[str, Any]:
        """The stride."""
        return {"query_stride": self.stride}

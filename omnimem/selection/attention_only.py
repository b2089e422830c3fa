"""Keep what has been attended to: accumulated attention mass, mean over heads, nothing else."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from omnimem.errors import OmniMemError
from omnimem.selection.base import Candidates, MassSpec, SelectionMethod


class AttentionOnly(SelectionMethod):
    """The accumulated attention score, mean over heads, alone: the a of ψ = a^λ · (1 − s).

    Parameters
    ----------
    mass_stride : int
        1: exact attention mass; above: only every so many-th query of a chunk is asked.
    """

    def __init__(self, mass_stride: int = 1) -> None:
        if mass_stride < 1:
            raise OmniMemError(f"selection attention_only: mass_stride must be at least 1, got {mass_stride}")
        self.mass = MassSpec("heads", mass_stride)
        self.stride = mass_stride

    def score(self, candidates: Candidates) -> Tensor:
        """Accumulated mass."""
        assert candidates.mass is not None
        return candidates.mass

    def settings(self) -> dict[str, Any]:
        """The stride."""
        return {"mass_stride": self.stride}

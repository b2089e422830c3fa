"""Retain a uniformly random sample of the stream: a baseline that uses no content."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnimem.selection.base import Candidates, SelectionMethod


class Random(SelectionMethod):
    """A uniform random sample of the stream: each token draws one priority from its index, the layer and the seed.

    Retaining the highest priorities is reservoir sampling: whatever the chunk length, every token of the stream is
    retained with the same probability.

    Parameters
    ----------
    seed : int
        Seed of the priorities.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, candidates: Candidates) -> Tensor:
        """Priority in [0, 1), float64."""
        stream = candidates.metadata.index
        bits = _mix(stream + _mix(torch.tensor(candidates.layer * 2_147_483_647 + self.seed, device=stream.device)))
        return (bits & ((1 << 53) - 1)).double() / (1 << 53)

    def settings(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": self.seed}


def _mix(x: Tensor) -> Tensor:
    """SplitMix64 finaliser on int64 (arithmetic wraps around)."""
    x = x * -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)

"""Retain everything: the uncompressed cache, the reference for every method."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimem.selection.base import Candidates, SelectionMethod


class Full(SelectionMethod):
    """Everything: no eviction, the cache grows with the stream."""

    keeps_everything = True

    def score(self, candidates: Candidates) -> Tensor:
        """Zero for all."""
        return torch.zeros(candidates.metadata.index.shape, device=candidates.metadata.index.device)

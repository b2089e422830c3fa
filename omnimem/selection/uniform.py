"""Keep every ⌊i·N/C⌋-th candidate of each modality, the same for all heads (baselines.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimem.modality import EVICTABLE
from omnimem.selection.base import Candidates, SelectionMethod


class Uniform(SelectionMethod):
    """Of N candidates of a modality and a budget of C, keep those of rank ⌊i·N/C⌋, i = 0 … C − 1."""

    def score(self, candidates: Candidates) -> Tensor:
        """1 for a kept candidate, 0 for the others."""
        table = candidates.table
        score = torch.zeros(table.index.shape, device=table.index.device)
        for name, kind in EVICTABLE.items():
            competing = (table.modality == kind) & table.valid
            total = competing.sum(1, keepdim=True)
            budget = torch.minimum(total, torch.tensor(getattr(candidates.budget, name), device=total.device))
            rank = competing.cumsum(1) - 1
            # Rank r is ⌊i·N/C⌋ for some i exactly when ⌈r·C/N⌉·N < (r + 1)·C, in whole numbers.
            total = total.clamp_min(1)
            i = (rank * budget + total - 1) // total
            score[competing & (i * total < (rank + 1) * budget)] = 1.0
        return score

"""From scores to the kept set: the budget's best of each modality, all text, ties to the more recent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omnimem.budget import LayerBudget
from omnimem.modality import EVICTABLE, TEXT

if TYPE_CHECKING:
    from omnimem.memory.table import PositionTable


def keep_mask(score: Tensor, table: PositionTable, budget: LayerBudget) -> Tensor:
    """Mark what stays.

    Parameters
    ----------
    score : Tensor
        ``[B, N]``, larger is better.
    table : PositionTable
        Facts of the same N candidates, in stream order.
    budget : LayerBudget
        How many visual and audio positions stay.

    Returns
    -------
    Tensor
        bool ``[B, N]``: all text, and min(budget, available) positions of each modality.
    """
    keep = (table.modality == TEXT) & table.valid
    for name, kind in EVICTABLE.items():
        competing = (table.modality == kind) & table.valid
        # Reversed, then sorted stably: among equal scores the later position comes first on every device.
        masked = score.masked_fill(~competing, -torch.inf).flip(1)
        best = masked.sort(dim=1, descending=True, stable=True).indices[:, : getattr(budget, name)]
        chosen = torch.zeros_like(competing).scatter_(1, score.shape[1] - 1 - best, True)
        keep |= chosen & competing
    return keep

"""From scores to the kept set: the budget's best of each modality, all text, ties to the more recent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omnimem.budget import LayerBudget
from omnimem.modality import EVICTABLE, TEXT

if TYPE_CHECKING:
    from omnimem.memory.table import TokenMetadata


def keep_mask(
    score: Tensor, table: TokenMetadata, budget: LayerBudget, reserved: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Mark what stays.

    Parameters
    ----------
    score : Tensor
        ``[R, N]``, larger is better.
    table : TokenMetadata
        Facts of the same N candidates, in stored order.
    budget : LayerBudget
        How many visual and audio positions stay.
    reserved : mapping, optional
        Name of a modality → int64 ``[R]``: how much of its budget each row leaves to positions made anew.

    Returns
    -------
    Tensor
        bool ``[R, N]``: all text, and min(budget - reserved, available) positions of each modality.
    """
    keep = (table.modality == TEXT) & table.valid
    for name, kind in EVICTABLE.items():
        competing = (table.modality == kind) & table.valid
        places = getattr(budget, name)
        left = None if reserved is None or name not in reserved else places - reserved[name]
        keep |= topk_mask(score, competing, places, left)
    return keep


def topk_mask(score: Tensor, competing: Tensor, count: int, counts: Tensor | None = None) -> Tensor:
    """Mark the `count` (or `counts` ``[R]``, none above it) highest scores among `competing`: bool ``[R, N]``."""
    # Reversed, then sorted stably: among equal scores the later position comes first on every device.
    masked = score.masked_fill(~competing, -torch.inf).flip(1)
    order = masked.sort(dim=1, descending=True, stable=True).indices[:, :count]
    within: bool | Tensor = True
    if counts is not None:
        within = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    return torch.zeros_like(competing).scatter_(1, score.shape[1] - 1 - order, within) & competing


def recent_mask(member: Tensor, count: int) -> Tensor:
    """Mark the last `count` members of each row ``[R, N]``."""
    return member & (member.flip(1).cumsum(1).flip(1) <= count)


def dense_rank(values: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each member's value among the distinct values of its row ``[R, N]``, and how many there are ``[R]``.

    Values must be below 2^40; what stands at columns that are no members means nothing.
    """
    ordered, order = values.masked_fill(~member, 2**40).sort(dim=1)
    fresh = torch.ones_like(member)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = torch.zeros_like(order).scatter_(1, order, fresh.cumsum(1) - 1)
    return rank, (fresh & (ordered < 2**40)).sum(1)

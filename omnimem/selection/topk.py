"""From scores to the retained set: the highest scores of each modality up to its budget, and all text."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from omnimem.budget import LayerBudget
from omnimem.modality import EVICTABLE, TEXT
from omnimem.token_metadata import TokenMetadata


def keep_mask(
    score: Tensor, metadata: TokenMetadata, budget: LayerBudget, reserved: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Mark the tokens to retain.

    Parameters
    ----------
    score : Tensor
        ``[R, N]``, higher is better; ties go to the more recent token.
    metadata : TokenMetadata
        Of the same N candidates, in stored order.
    budget : LayerBudget
        How many visual and audio tokens are retained.
    reserved : mapping, optional
        Name of a modality → int64 ``[R]``: how much of its budget each row reserves for merged tokens.

    Returns
    -------
    Tensor
        bool ``[R, N]``: all text, and min(budget - reserved, available) tokens of each modality.
    """
    keep = (metadata.modality == TEXT) & metadata.valid
    for name, kind in EVICTABLE.items():
        competing = (metadata.modality == kind) & metadata.valid
        limit = getattr(budget, name)
        limits = None if reserved is None or name not in reserved else limit - reserved[name]
        keep |= topk_mask(score, competing, limit, limits)
    return keep


def topk_mask(score: Tensor, competing: Tensor, count: int, counts: Tensor | None = None) -> Tensor:
    """Mark the `count` highest scores among `competing`, in each row at most `counts` ``[R]``: bool ``[R, N]``."""
    # Reversed, then sorted stably: among equal scores the later token comes first on every device.
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

    Values must be below 2^40; ranks of columns that are no members are undefined.
    """
    ordered, order = values.masked_fill(~member, 2**40).sort(dim=1)
    fresh = torch.ones_like(member)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = torch.zeros_like(order).scatter_(1, order, fresh.cumsum(1) - 1)
    return rank, (fresh & (ordered < 2**40)).sum(1)

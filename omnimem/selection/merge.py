"""Positions made of others: which candidates flow into which mean, and where that mean stands."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimem.memory.table import TokenMetadata
from omnimem.selection.base import MergedTokens


def means(table: TokenMetadata, into: Tensor, weight: Tensor, slots: int) -> MergedTokens:
    """Describe `slots` means of candidates, for `SelectionMethod.choose`.

    A mean stands at the rounded mean of its members' rotary ids and at their mean time.

    Parameters
    ----------
    table : TokenMetadata
        Facts of the candidates ``[R, N]``.
    into : Tensor
        int64 ``[R, N]``: the mean each flows into, -1 for none. Members of a mean have one modality.
    weight : Tensor
        ``[R, N]``: how much each counts, at least 0.
    slots : int
        How many means there may be; those without a member are padding.
    """
    rows = len(into)
    member = into >= 0
    target = into.clamp_min(0)

    def total(values: Tensor) -> Tensor:
        empty = torch.zeros(rows, slots, dtype=values.dtype, device=values.device)
        return empty.scatter_add_(1, target, values * member)

    weight = weight.clamp_min(torch.finfo(weight.dtype).tiny)
    weight = (weight / total(weight).clamp_min(torch.finfo(weight.dtype).tiny).gather(1, target)) * member
    count = total(member.to(torch.int64))

    def mean(values: Tensor) -> Tensor:
        return total(values.double().nan_to_num(0)) / count.clamp_min(1)

    first = torch.full_like(count, torch.iinfo(torch.int64).max)
    origin = torch.where(table.index < 0, -1 - table.index, table.index)
    first.scatter_reduce_(1, target, torch.where(member, origin, torch.iinfo(torch.int64).max), "amin")
    position = torch.stack([mean(table.position_ids[..., axis]).round() for axis in range(3)], dim=-1)
    kind = torch.zeros_like(count, dtype=table.modality.dtype)
    kind.scatter_reduce_(1, target, table.modality * member, "amax")
    valid = count > 0
    facts = TokenMetadata(
        index=torch.where(valid, -1 - first, 0),
        position_ids=position.to(table.position_ids.dtype),
        time=mean(table.time).float(),
        modality=kind,
        valid=valid,
    )
    return MergedTokens(into, weight, facts)

"""Merged tokens: weighted means of candidates, with their metadata."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimem.selection.base import MergedTokens
from omnimem.token_metadata import TokenMetadata


def merge_tokens(table: TokenMetadata, into: Tensor, weight: Tensor, slots: int) -> MergedTokens:
    """Describe `slots` merged tokens, for `SelectionMethod.select`.

    A merged token has the rounded mean of its members' position ids, and their mean time.

    Parameters
    ----------
    table : TokenMetadata
        Metadata of the candidates ``[R, N]``.
    into : Tensor
        int64 ``[R, N]``: the slot each candidate is merged into, -1 for none. Members of a slot have one modality.
    weight : Tensor
        ``[R, N]``: weight of each candidate, at least 0.
    slots : int
        Number of slots; those without a member are padding.
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
    metadata = TokenMetadata(
        index=torch.where(valid, -1 - first, 0),
        position_ids=position.to(table.position_ids.dtype),
        time=mean(table.time).float(),
        modality=kind,
        valid=valid,
    )
    return MergedTokens(into, weight, metadata)

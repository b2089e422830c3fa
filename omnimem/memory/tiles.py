"""Causal attention in tiles: a chunk of queries, the last tokens of the keys, a few rows at a time.

No function here makes an attention matrix of more than one tile of queries and one key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

WEIGHT_TILE = 128
"""Queries whose weights exist at once, one key-value head at a time; two cores are fastest at 64 to 128."""


def compute_dtype(query: Tensor) -> torch.dtype:
    """Dtype of attention weights: float32 (float64 for float64 states)."""
    return torch.promote_types(query.dtype, torch.float32)


def causal_tiles(
    rows: range, past: int, valid: Tensor | None, tile: int, device: torch.device
) -> Iterator[tuple[int, int, int, Tensor | None]]:
    """Tiles of the queries `rows` of a chunk that follows `past` keys.

    Yields (start, stop, visible keys, mask ``[B or 1, 1, stop - start, visible]`` or None); start and stop index
    `rows`.
    """
    for start in range(0, len(rows), tile):
        stop = min(start + tile, len(rows))
        visible = past + rows[stop - 1] + 1
        if stop - start == 1 and valid is None:
            yield start, stop, visible, None
            continue
        column = torch.arange(visible, device=device)
        row = past + torch.arange(rows[start], rows[stop - 1] + 1, rows.step, device=device)[:, None]
        mask = (column <= row)[None]
        if valid is not None:
            mask = mask & (valid[:, None, :visible] | (column == row))
        yield start, stop, visible, mask[:, None]


def logit_tiles(
    query: Tensor, key: Tensor, rows: range, queries: int, valid: Tensor | None, scale: float, tile: int
) -> Iterator[tuple[int, int, int, Tensor]]:
    """Logits of the queries `rows` out of a chunk of `queries`, one key-value head and one tile at a time.

    Yields (key-value head, start, stop, logits ``[B, H/G, stop - start, visible keys]``). start and stop index `rows`;
    the logits are -inf where a query must not attend, and the caller may overwrite them.
    """
    batch, heads, _, dim = query.shape
    groups, past = key.shape[1], key.shape[2] - queries
    dtype = compute_dtype(query)
    scaled = (query.to(dtype) * scale).view(batch, groups, heads // groups, len(rows), dim)
    for group in range(groups):
        # One copy per head lets the product read keys in order: a quarter of its time.
        group_key = key[:, group].to(dtype).transpose(-1, -2).contiguous()
        for start, stop, visible, mask in causal_tiles(rows, past, valid, tile, query.device):
            logits = scaled[:, group, :, start:stop].flatten(1, 2) @ group_key[..., :visible]
            logits = logits.view(batch, -1, stop - start, visible)
            if mask is not None:
                # Without padding only columns of the tile itself can be hidden, and the earlier ones are many more.
                hidden = past + rows[start] if valid is None else 0
                logits[..., hidden:].masked_fill_(~mask[..., hidden:], -torch.inf)
            yield group, start, stop, logits


def weight_tiles(*args: Any) -> Iterator[tuple[int, int, int, Tensor]]:
    """`logit_tiles` with a softmax over the visible keys."""
    return ((group, start, stop, logits.softmax(-1)) for group, start, stop, logits in logit_tiles(*args))

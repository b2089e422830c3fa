"""Attention over a memory that is longer than its queries, and the mass each key receives.

Two pure functions on post-RoPE states, used by every backbone through `compressed_attention`:

* `lower_right_attention`: the queries are the *last* positions of the keys. Fused kernels call this
  "lower-right" causal; `is_causal=True` alone means upper-left as soon as there is a past, so the mask is
  always explicit here, one tile of queries at a time, and the full matrix never exists.
* `attention_mass`: the column sums of the attention matrix, again tile by tile (method.md §5).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from omnimem.selection.base import MassKind

if TYPE_CHECKING:
    from omnimem.memory.layer import CompressedLayer

ATTENTION_NAME = "omnimem"
"""Name under which `compressed_attention` is registered with transformers."""

QUERY_TILE = 256
"""Queries a fused call sees at once: the mask of a tile is [QUERY_TILE, K], whatever the chunk."""

MASS_TILE = 128
"""Queries whose weights exist at once while the mass is summed; two cores are fastest at 128."""


def lower_right_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tile: int = QUERY_TILE,
) -> Tensor:
    """Causal attention of the last Q positions over all K positions, differentiable.

    Parameters
    ----------
    query : Tensor
        Post-RoPE queries ``[B, H, Q, D]``.
    key, value : Tensor
        Post-RoPE keys and values ``[B, G, K, D]``, K >= Q, H a multiple of G (grouped queries).
    valid : Tensor, optional
        Bool ``[B, K]``, False where a column is padding. A padded query sees itself, so that its
        (ignored) output stays finite.
    scaling : float, optional
        Factor on q·k; 1/√D by default.
    dropout : float
        Dropout on the attention weights.
    tile : int
        Queries per fused call.

    Returns
    -------
    Tensor
        ``[B, H, Q, D]``.
    """
    batch, heads, queries, dim = query.shape
    groups = key.shape[1]
    outputs = []
    for start, stop, visible, mask in _causal_tiles(range(queries), key.shape[2] - queries, valid, tile, query.device):
        # Folding the query heads of a group into the rows reads each key once and repeats nothing.
        rows = query[:, :, start:stop].reshape(batch, groups, -1, dim)
        if mask is not None:
            mask = mask.repeat(1, 1, heads // groups, 1)
        tile_out = F.scaled_dot_product_attention(
            rows, key[:, :, :visible], value[:, :, :visible], attn_mask=mask, dropout_p=dropout, scale=scaling
        )
        outputs.append(tile_out.view(batch, heads, stop - start, value.shape[-1]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


@torch.no_grad()
def attention_mass(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None = None,
    scaling: float | None = None,
    kind: MassKind = "heads",
    stride: int = 1,
    tile: int = MASS_TILE,
) -> Tensor:
    """Attention mass a_k = Σ_q A[q, k] that each key receives from the queries (method.md §2).

    Parameters
    ----------
    query, key, valid, scaling
        As in `lower_right_attention`.
    kind : {"heads", "concat"}
        ``heads``: mean over the query heads of their softmax weights (the paper). ``concat``: one softmax
        over head-concatenated q·k / (√D · H) (the release).
    stride : int
        1 is exact; above, only every so many-th query is asked, and counts for those left out.
    tile : int
        Queries whose weights exist at once.

    Returns
    -------
    Tensor
        ``[B, K]``, float32 (float64 for float64 inputs). Padded queries give nothing, padded keys get nothing.
    """
    groups, keys = key.shape[1], key.shape[2]
    rows = range(min(stride, query.shape[2]) - 1, query.shape[2], stride)
    past = keys - query.shape[2]
    query = query[:, :, rows.start :: stride]
    batch, heads, queries, dim = query.shape
    scale = dim**-0.5 if scaling is None else scaling
    dtype = torch.promote_types(query.dtype, torch.float32)
    mass = torch.zeros(batch, keys, dtype=dtype, device=query.device)
    query = (query.to(dtype) * scale).view(batch, groups, heads // groups, queries, dim)
    if kind == "concat":
        # Σ_h q_h·k_g(h) = Σ_g (Σ_{h in g} q_h)·k_g: one head as wide as all key heads together.
        query = (query.sum(2) / heads).transpose(1, 2).reshape(batch, 1, 1, queries, groups * dim)
        key = key.transpose(1, 2).reshape(batch, 1, keys, groups * dim)
    for group in range(key.shape[1]):
        # One copy a group lets the product read keys in order: a quarter of its time.
        group_key = key[:, group].to(dtype).transpose(-1, -2).contiguous()
        for start, stop, visible, mask in _causal_tiles(rows, past, valid, tile, query.device):
            logits = query[:, group, :, start:stop].flatten(1, 2) @ group_key[..., :visible]
            logits = logits.view(batch, -1, stop - start, visible)
            if mask is not None:
                # Without padding only the columns of the tile itself can be hidden; the past is a lot longer.
                hidden = past + rows[start] if valid is None else 0
                logits[..., hidden:].masked_fill_(~mask[..., hidden:], -torch.inf)
            weights = logits.softmax(-1)
            if valid is not None:
                asked = valid[:, past:][:, rows.start :: stride][:, start:stop]
                weights *= asked[:, None, :, None]
            mass[:, :visible] += weights.sum((1, 2))
    if kind == "heads":
        mass /= heads
    return mass if stride == 1 else mass * ((keys - past) / queries)


def _causal_tiles(
    rows: range, past: int, valid: Tensor | None, tile: int, device: torch.device
) -> Iterator[tuple[int, int, int, Tensor | None]]:
    """Tiles of the queries `rows` of a chunk that follows `past` keys.

    Yields (start, stop, visible keys, mask ``[B or 1, 1, stop - start, visible]`` or None); start, stop count `rows`.
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


def compressed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    memory: CompressedLayer | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function registered with transformers; `memory` is injected by `omnimem.memory.attach`.

    With a `CompressedCache` the layer knows which columns are real and wants to hear about attention mass; the
    model's own mask is not used. Without one this is stock SDPA.
    """
    if memory is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    output = lower_right_attention(query, key, value, memory.valid, scaling, dropout)
    if memory.wants_mass is not None:
        memory.observe_mass(
            attention_mass(query, key, memory.valid, scaling, memory.wants_mass, memory.method.mass_stride)
        )
    return output.transpose(1, 2).contiguous(), None

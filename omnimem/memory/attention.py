"""Attention over a memory that is longer than its queries, and the mass each key receives.

Pure functions on post-RoPE states, used by every backbone through `compressed_attention`:

* `lower_right_attention`: the queries are the *last* positions of the keys. Fused kernels call this "lower-right"
  causal; `is_causal=True` alone means upper-left as soon as there is a past.
* `attention_scores`: the column sums of the attention matrix, tile by tile, so that it never exists (method.md §5).
* `attention_with_scores`: both in one pass over q·kᵀ, with its own backward: what a chunk costs on the CPU with exact
  mass is what fused attention costs without. On CUDA fused attention gives the output and the row log-sum-exp, and
  a kernel of ours sums the columns (`omnimem.memory.kernels`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from omnimem.selection.base import AttentionScoreKind, ProbeScope

if TYPE_CHECKING:
    from omnimem.memory.layer import CompressedLayer

ATTENTION_NAME = "omnimem"
"""Name under which `compressed_attention` is registered with transformers."""

QUERY_TILE = 256
"""Queries a fused call sees at once: the mask of a tile is [QUERY_TILE, K], whatever the chunk."""

WEIGHT_TILE = 128
"""Queries whose weights exist at once, one key-value head at a time; two cores are fastest at 64 to 128."""


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
        Queries per fused call where a mask has to be made.

    Returns
    -------
    Tensor
        ``[B, H, Q, D]``.
    """
    batch, heads, queries, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    if query.is_cuda and valid is None and queries > 1:
        # No mask is made: the fused kernels know this shape of causality.
        bias: Any = causal_lower_right(queries, keys)
        return F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scaling, enable_gqa=True)
    outputs = []
    for start, stop, visible, mask in _causal_tiles(range(queries), keys - queries, valid, tile, query.device):
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
def attention_scores(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None = None,
    scaling: float | None = None,
    kind: AttentionScoreKind = "heads",
    stride: int = 1,
    window: int | None = None,
    tile: int = WEIGHT_TILE,
) -> Tensor:
    """Attention mass a_k = Σ_q A[q, k] that each key receives from the queries (method.md §2).

    Parameters
    ----------
    query, key, valid, scaling
        As in `lower_right_attention`.
    kind : {"heads", "kv_heads", "concat"}
        ``heads``: mean over the query heads of their softmax weights (the paper). ``groups``: the same for the query
        heads of each key-value head by itself. ``concat``: one softmax over head-concatenated q·k / (√D · H) (the
        release).
    stride : int
        1 is exact; above, only every so many-th query is asked, and counts for those left out.
    window : int, optional
        Ask only the last so many real queries of each sample, whatever `stride` says.
    tile : int
        Queries whose weights exist at once.

    Returns
    -------
    Tensor
        ``[B, K]`` (``[B, G, K]`` for ``groups``), float32 (float64 for float64 inputs). Padded queries give nothing,
        padded keys get nothing.
    """
    batch, heads, queries, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    scale = dim**-0.5 if scaling is None else scaling
    if kind == "concat":
        # Σ_h q_h·k_g(h) = Σ_g (Σ_{h in g} q_h)·k_g: one head as wide as all key heads together.
        query = query.to(_compute_dtype(query)).view(batch, groups, heads // groups, queries, dim).sum(2) / heads
        query = query.transpose(1, 2).reshape(batch, 1, queries, groups * dim)
        key = key.transpose(1, 2).reshape(batch, 1, keys, groups * dim)
    rows = _asked(queries, stride, window, valid)
    weight = _row_weights(query, keys, valid, stride, window)
    weight = weight[:, rows.start : rows.stop : rows.step]
    mass = torch.zeros(batch, key.shape[1], keys, dtype=_compute_dtype(query), device=query.device)
    asked = query[:, :, rows.start : rows.stop : rows.step]
    for group, start, stop, weights in _weight_tiles(asked, key, rows, queries, valid, scale, tile):
        mass[:, group, : weights.shape[-1]] += _weighted_columns(weights, weight[:, start:stop])
    mass *= key.shape[1] / query.shape[1]
    return mass if kind == "kv_heads" else mass.mean(1)


def attention_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    scaling: float | None = None,
    stride: int = 1,
    window: int | None = None,
    tile: int = WEIGHT_TILE,
    fused: bool = True,
) -> tuple[Tensor, Tensor]:
    """`lower_right_attention` and the `attention_scores` of kind ``groups`` from one pass over q·kᵀ, differentiable.

    Only the inputs are kept for the backward, which computes the weights once more, tile by tile.

    Parameters
    ----------
    query, key, value, valid, scaling, stride, window, tile
        As in the two functions.
    fused : bool
        Whether a fused kernel may be used where there is one; its mass has no gradient.

    Returns
    -------
    tuple of Tensor
        Output ``[B, H, Q, D]`` and mass ``[B, G, K]``.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    half = query.dtype in (torch.float16, torch.bfloat16)
    # Flash attention wants values as wide as keys, which those of the soft form (`CompressedLayer.biased`) are not.
    even = query.shape[-1] % 8 == 0 and query.shape[-1] == value.shape[-1]
    if fused and query.is_cuda and valid is None and half and even:
        return _fused_with_mass(query, key, value, scale, stride, window)
    weight = _row_weights(query, key.shape[2], valid, stride, window)
    return _AttentionWithMass.apply(query, key, value, valid, weight, scale, tile)  # pyright: ignore[reportReturnType]


def _fused_with_mass(
    query: Tensor, key: Tensor, value: Tensor, scale: float, stride: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """On CUDA: flash attention, whose log-sum-exp a second kernel turns into column sums."""
    from omnimem.memory.kernels import column_sums

    # This operator's is_causal is lower-right, unlike that of scaled_dot_product_attention.
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p=0.0, is_causal=True, scale=scale
    )
    queries, past = query.shape[2], key.shape[2] - query.shape[2]
    rows = _asked(queries, stride, window, None)
    with torch.no_grad():
        picked = slice(rows.start, rows.stop, rows.step)
        mass = column_sums(query[:, :, picked], key, lse[:, :, picked], past + rows.start, rows.step, scale)
    return output, mass if window else mass * (queries / len(rows))


@torch.no_grad()
def probe_attention(
    query: Tensor, key: Tensor, valid: Tensor | None, scaling: float | None, attends: ProbeScope
) -> Tensor:
    """Mean attention, over heads and queries, of a probe to what is stored before it.

    Parameters
    ----------
    query : Tensor
        Post-RoPE queries of the probe ``[B, H, P, D]``.
    key : Tensor
        Post-RoPE keys ``[B, G, N + P, D]``: what is stored, then the probe's own.
    valid, scaling
        As in `lower_right_attention`.
    attends : {"causal", "all", "memory"}
        Each query's softmax goes over what is stored and the probe up to itself, all of the probe, or none of it.

    Returns
    -------
    Tensor
        ``[B, N]``.
    """
    batch, heads, queries, dim = query.shape
    groups, stored = key.shape[1], key.shape[2] - queries
    if attends == "causal":
        return attention_scores(query, key, valid, scaling)[:, :stored] / queries
    reach = stored if attends == "memory" else key.shape[2]
    scale = dim**-0.5 if scaling is None else scaling
    dtype = _compute_dtype(query)
    mass = torch.zeros(batch, stored, dtype=dtype, device=query.device)
    rows = (query.to(dtype) * scale).reshape(batch, groups, -1, dim)
    for group in range(groups):
        logits = rows[:, group] @ key[:, group, :reach].to(dtype).transpose(-1, -2)
        if valid is not None:
            logits.masked_fill_(~valid[:, None, :reach], -torch.inf)
        mass += logits.softmax(-1)[..., :stored].sum(1)
    return mass / (heads * queries)


@torch.no_grad()
def row_lse(query: Tensor, key: Tensor, valid: Tensor | None, scale: float, tile: int = WEIGHT_TILE) -> Tensor:
    """Log-sum-exp of the logits of every query over the keys it sees, ``[B, H, Q]`` in at least float32."""
    batch, heads, queries, _ = query.shape
    groups = key.shape[1]
    lse = torch.empty(batch, groups, heads // groups, queries, dtype=_compute_dtype(query), device=query.device)
    for group, start, stop, logits in _logit_tiles(query, key, range(queries), queries, valid, scale, tile):
        lse[:, group, :, start:stop] = logits.logsumexp(-1)
    return lse.flatten(1, 2)


class _AttentionWithMass(torch.autograd.Function):
    """One pass over q·kᵀ for output and mass; the backward recomputes the weights instead of storing them."""

    @staticmethod
    def forward(ctx: Any, query, key, value, valid, weight, scale, tile):
        batch, heads, queries, _ = query.shape
        groups, keys = key.shape[1], key.shape[2]
        output = query.new_empty(batch, heads, queries, value.shape[-1])
        by_group = output.view(batch, groups, heads // groups, queries, -1)
        mass = torch.zeros(batch, groups, keys, dtype=_compute_dtype(query), device=query.device)
        for group, start, stop, weights in _weight_tiles(query, key, range(queries), queries, valid, scale, tile):
            visible = weights.shape[-1]
            mass[:, group, :visible] += _weighted_columns(weights, weight[:, start:stop])
            seen = value[:, group, :visible].to(weights.dtype)
            by_group[:, group, :, start:stop] = (weights.flatten(1, 2) @ seen).unflatten(1, (-1, stop - start))
        mass *= groups / heads
        ctx.save_for_backward(query, key, value, valid, weight)
        ctx.scale, ctx.tile = scale, tile
        return output, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output, grad_mass):  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, valid, weight = ctx.saved_tensors
        batch, heads, queries, dim = query.shape
        groups, scale = key.shape[1], ctx.scale
        dtype = _compute_dtype(query)
        grad_query = torch.empty(query.shape, dtype=dtype, device=query.device)
        grad_key = torch.zeros(key.shape, dtype=dtype, device=query.device)
        grad_value = torch.zeros(value.shape, dtype=dtype, device=query.device)
        split = (batch, groups, heads // groups, queries)
        by_group, asked, reached = grad_query.view(*split, dim), query.view(*split, dim), grad_output.view(*split, -1)
        for group, start, stop, weights in _weight_tiles(query, key, range(queries), queries, valid, scale, ctx.tile):
            visible = weights.shape[-1]
            weights = weights.flatten(1, 2)
            behind = reached[:, group, :, start:stop].flatten(1, 2).to(dtype)
            grad = behind @ value[:, group, :visible].to(dtype).transpose(-1, -2)
            share = weight[:, start:stop].repeat(1, heads // groups) * (groups / heads)
            grad += share[..., None] * grad_mass[:, group, None, :visible]
            grad_value[:, group, :visible] += weights.transpose(-1, -2) @ behind
            # Through the softmax: dS = P ∘ (dP − Σ_k P dP).
            weights *= grad - torch.einsum("bqk,bqk->bq", weights, grad)[..., None]
            by_group[:, group, :, start:stop] = (weights @ key[:, group, :visible].to(dtype) * scale).unflatten(
                1, (-1, stop - start)
            )
            grad_key[:, group, :visible] += (
                weights.transpose(-1, -2) @ asked[:, group, :, start:stop].flatten(1, 2).to(dtype) * scale
            )
        grads = (grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype))
        return (*grads, None, None, None, None)


def _compute_dtype(query: Tensor) -> torch.dtype:
    """Weights are float32 (float64 for float64 states)."""
    return torch.promote_types(query.dtype, torch.float32)


def _asked(queries: int, stride: int, window: int | None, valid: Tensor | None) -> range:
    """Queries among which are all that count for the mass."""
    if valid is not None:
        return range(queries)  # which ones they are differs between samples
    return range(queries)[-window:] if window else range((queries - 1) % stride, queries, stride)


def _row_weights(query: Tensor, keys: int, valid: Tensor | None, stride: int, window: int | None) -> Tensor:
    """How much each query counts for the mass: ``[B or 1, Q]``, 0 where it is not asked.

    A sample's weights do not depend on how far the batch pads it.
    """
    queries = query.shape[2]
    place = torch.arange(queries, device=query.device)[None]
    real = torch.ones_like(place, dtype=torch.bool) if valid is None else valid[:, keys - queries :]
    count = real.sum(1, keepdim=True)
    if window is not None:
        return (real & (place >= count - window)).to(_compute_dtype(query))
    # Counted from the end: the last query sees every key, so none is left without mass.
    asked = real & ((count - 1 - place) % stride == 0)
    return asked * (count.to(_compute_dtype(query)) / asked.sum(1, keepdim=True).clamp_min(1))


def _weighted_columns(weights: Tensor, weight: Tensor) -> Tensor:
    """Sum over heads and queries of ``[B, H, Q, K]``, each query counted `weight` ``[B or 1, Q]`` times: ``[B, K]``."""
    batch, heads, queries, _ = weights.shape
    rows = weight[:, None].expand(batch, heads, queries).reshape(batch, 1, -1)
    return (rows @ weights.flatten(1, 2))[:, 0]


def _weight_tiles(*args: Any) -> Iterator[tuple[int, int, int, Tensor]]:
    """`_logit_tiles` after their softmax."""
    return ((group, start, stop, logits.softmax(-1)) for group, start, stop, logits in _logit_tiles(*args))


def _logit_tiles(
    query: Tensor, key: Tensor, rows: range, queries: int, valid: Tensor | None, scale: float, tile: int
) -> Iterator[tuple[int, int, int, Tensor]]:
    """Logits of the rows `rows` of a chunk of so many queries, one key-value head and one tile at a time.

    Yields (key-value head, start, stop, logits ``[B, H/G, stop - start, visible keys]``), start and stop counting
    `rows`, -inf where a query must not look; the caller may overwrite them.
    """
    batch, heads, _, dim = query.shape
    groups, past = key.shape[1], key.shape[2] - queries
    dtype = _compute_dtype(query)
    scaled = (query.to(dtype) * scale).view(batch, groups, heads // groups, len(rows), dim)
    for group in range(groups):
        # One copy a head lets the product read keys in order: a quarter of its time.
        group_key = key[:, group].to(dtype).transpose(-1, -2).contiguous()
        for start, stop, visible, mask in _causal_tiles(rows, past, valid, tile, query.device):
            logits = scaled[:, group, :, start:stop].flatten(1, 2) @ group_key[..., :visible]
            logits = logits.view(batch, -1, stop - start, visible)
            if mask is not None:
                # Without padding only the columns of the tile itself can be hidden; the past is a lot longer.
                hidden = past + rows[start] if valid is None else 0
                logits[..., hidden:].masked_fill_(~mask[..., hidden:], -torch.inf)
            yield group, start, stop, logits


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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = memory.biased(query, key, scale)
    if memory.probe is not None:
        memory.observe_probe(probe_attention(query, key, memory.valid, scale, memory.probe.attends))
    wanted = memory.wants_mass
    if wanted is not None and wanted.kind != "concat" and dropout == 0:
        output, mass = attention_with_scores(
            query, key, value, memory.valid, scale, wanted.stride, wanted.window, fused=not memory.learns_attention
        )
        memory.observe_mass(mass if wanted.kind == "kv_heads" else mass.mean(1))
    else:
        output = lower_right_attention(query, key, value, memory.valid, scale, dropout)
        if wanted is not None:
            memory.observe_mass(
                attention_scores(
                    query, key, memory.valid, scale, wanted.kind, stride=wanted.stride, window=wanted.window
                )
            )
    if memory.margin is not None and torch.is_grad_enabled():
        output = memory.margin.reach(output, query, key, memory.valid, scale)
    return output.transpose(1, 2).contiguous(), None

"""Attention of a chunk over the cache and itself, alone or together with the attention scores.

Pure functions on post-RoPE states:

* `lower_right_attention`: the queries are the *last* tokens of the keys. Fused kernels call this "lower-right" causal;
  `is_causal=True` alone means upper-left as soon as there are earlier keys.
* `attention_with_scores`: attention and attention scores in one pass over q·kᵀ, with its own backward. On the CPU,
  attention plus exact scores costs about as much as fused attention alone. On CUDA fused attention returns the output
  and the row log-sum-exp, and a Triton kernel sums the columns (`omnimem.memory.kernels`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

from omnimem.memory.scores import query_weights, scored_queries, weighted_column_sums
from omnimem.memory.tiles import WEIGHT_TILE, causal_tiles, compute_dtype, weight_tiles

QUERY_TILE = 256
"""Queries a fused call sees at once: the mask of a tile is [QUERY_TILE, K], whatever the chunk."""


def lower_right_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tile: int = QUERY_TILE,
) -> Tensor:
    """Causal attention of the last Q tokens over all K tokens, differentiable.

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
    for start, stop, visible, mask in causal_tiles(range(queries), keys - queries, valid, tile, query.device):
        # Folding the query heads of a group into the rows reads each key once and repeats nothing.
        rows = query[:, :, start:stop].reshape(batch, groups, -1, dim)
        if mask is not None:
            mask = mask.repeat(1, 1, heads // groups, 1)
        tile_out = F.scaled_dot_product_attention(
            rows, key[:, :, :visible], value[:, :, :visible], attn_mask=mask, dropout_p=dropout, scale=scaling
        )
        outputs.append(tile_out.view(batch, heads, stop - start, value.shape[-1]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


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
    """`lower_right_attention` and the `attention_scores` of kind ``kv_heads`` from one pass over q·kᵀ, differentiable.

    Only the inputs are saved for the backward pass, which recomputes the weights tile by tile.

    Parameters
    ----------
    query, key, value, valid, scaling, stride, window, tile
        As in `lower_right_attention` and `omnimem.memory.scores.attention_scores`.
    fused : bool
        Whether a fused kernel may be used where there is one; its scores have no gradient.

    Returns
    -------
    tuple of Tensor
        Output ``[B, H, Q, D]`` and attention scores ``[B, G, K]``.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    half = query.dtype in (torch.float16, torch.bfloat16)
    # Flash attention needs values as wide as keys; the soft gradient adds channels to keys alone.
    flash_shapes = query.shape[-1] % 8 == 0 and query.shape[-1] == value.shape[-1]
    if fused and query.is_cuda and valid is None and half and flash_shapes:
        return _fused_with_scores(query, key, value, scale, stride, window)
    weight = query_weights(query, key.shape[2], valid, stride, window)
    return _AttentionWithScores.apply(query, key, value, valid, weight, scale, tile)  # pyright: ignore[reportReturnType]


def _fused_with_scores(
    query: Tensor, key: Tensor, value: Tensor, scale: float, stride: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """On CUDA: flash attention, whose log-sum-exp a second kernel turns into column sums."""
    from omnimem.memory.kernels import column_sums

    # This operator's is_causal is lower-right, unlike that of scaled_dot_product_attention.
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p=0.0, is_causal=True, scale=scale
    )
    queries, past = query.shape[2], key.shape[2] - query.shape[2]
    rows = scored_queries(queries, stride, window, None)
    with torch.no_grad():
        picked = slice(rows.start, rows.stop, rows.step)
        scores = column_sums(query[:, :, picked], key, lse[:, :, picked], past + rows.start, rows.step, scale)
    return output, scores if window else scores * (queries / len(rows))


class _AttentionWithScores(torch.autograd.Function):
    """One pass over q·kᵀ for output and scores; the backward recomputes the weights instead of storing them."""

    @staticmethod
    def forward(ctx: Any, query, key, value, valid, weight, scale, tile):
        batch, heads, queries, _ = query.shape
        groups, keys = key.shape[1], key.shape[2]
        output = query.new_empty(batch, heads, queries, value.shape[-1])
        by_group = output.view(batch, groups, heads // groups, queries, -1)
        scores = torch.zeros(batch, groups, keys, dtype=compute_dtype(query), device=query.device)
        for group, start, stop, weights in weight_tiles(query, key, range(queries), queries, valid, scale, tile):
            visible = weights.shape[-1]
            scores[:, group, :visible] += weighted_column_sums(weights, weight[:, start:stop])
            seen = value[:, group, :visible].to(weights.dtype)
            by_group[:, group, :, start:stop] = (weights.flatten(1, 2) @ seen).unflatten(1, (-1, stop - start))
        scores *= groups / heads
        ctx.save_for_backward(query, key, value, valid, weight)
        ctx.scale, ctx.tile = scale, tile
        return output, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output, grad_scores):  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, valid, weight = ctx.saved_tensors
        batch, heads, queries, dim = query.shape
        groups, scale = key.shape[1], ctx.scale
        dtype = compute_dtype(query)
        grad_query = torch.empty(query.shape, dtype=dtype, device=query.device)
        grad_key = torch.zeros(key.shape, dtype=dtype, device=query.device)
        grad_value = torch.zeros(value.shape, dtype=dtype, device=query.device)
        split = (batch, groups, heads // groups, queries)
        by_group, query_by_group, grad_by_group = (
            grad_query.view(*split, dim),
            query.view(*split, dim),
            grad_output.view(*split, -1),
        )
        for group, start, stop, weights in weight_tiles(query, key, range(queries), queries, valid, scale, ctx.tile):
            visible = weights.shape[-1]
            weights = weights.flatten(1, 2)
            grad_rows = grad_by_group[:, group, :, start:stop].flatten(1, 2).to(dtype)
            grad = grad_rows @ value[:, group, :visible].to(dtype).transpose(-1, -2)
            share = weight[:, start:stop].repeat(1, heads // groups) * (groups / heads)
            grad += share[..., None] * grad_scores[:, group, None, :visible]
            grad_value[:, group, :visible] += weights.transpose(-1, -2) @ grad_rows
            # Through the softmax: dS = P ∘ (dP − Σ_k P dP).
            weights *= grad - torch.einsum("bqk,bqk->bq", weights, grad)[..., None]
            by_group[:, group, :, start:stop] = (weights @ key[:, group, :visible].to(dtype) * scale).unflatten(
                1, (-1, stop - start)
            )
            grad_key[:, group, :visible] += (
                weights.transpose(-1, -2) @ query_by_group[:, group, :, start:stop].flatten(1, 2).to(dtype) * scale
            )
        grads = (grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype))
        return (*grads, None, None, None, None)

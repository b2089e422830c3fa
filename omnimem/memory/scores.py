"""Attention scores: how much attention each key receives, the column sums of the attention matrix, tile by tile.

Pure functions on post-RoPE states. Nothing here has a gradient; `omnimem.memory.attention.attention_with_scores` has
one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omnimem.memory.tiles import WEIGHT_TILE, compute_dtype, logit_tiles, weight_tiles
from omnimem.selection.base import AttentionScoreKind, ProbeScope


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
    """Attention scores a_k = Σ_q A[q, k] that each key receives from the queries (arXiv 2606.07577).

    Parameters
    ----------
    query, key, valid, scaling
        As in `lower_right_attention`.
    kind : {"heads", "kv_heads", "concat"}
        ``heads``: mean over the query heads of their softmax weights (the paper). ``kv_heads``: the same, for each
        key-value head over the query heads that share it. ``concat``: one softmax over head-concatenated q·k / (√D ·
        H) (the release).
    stride : int
        1 is exact; above, only every stride-th query is used; its weight also covers the queries skipped.
    window : int, optional
        Use only the last `window` real queries of each sample, whatever `stride` is.
    tile : int
        Queries whose weights exist at once.

    Returns
    -------
    Tensor
        ``[B, K]`` (``[B, G, K]`` for ``kv_heads``), float32 (float64 for float64 inputs). Padded queries and keys
        have no part in it.
    """
    batch, heads, queries, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    scale = dim**-0.5 if scaling is None else scaling
    if kind == "concat":
        # Σ_h q_h·k_g(h) = Σ_g (Σ_{h in g} q_h)·k_g: one head as wide as all key heads together.
        query = query.to(compute_dtype(query)).view(batch, groups, heads // groups, queries, dim).sum(2) / heads
        query = query.transpose(1, 2).reshape(batch, 1, queries, groups * dim)
        key = key.transpose(1, 2).reshape(batch, 1, keys, groups * dim)
    rows = scored_queries(queries, stride, window, valid)
    weight = query_weights(query, keys, valid, stride, window)
    weight = weight[:, rows.start : rows.stop : rows.step]
    scores = torch.zeros(batch, key.shape[1], keys, dtype=compute_dtype(query), device=query.device)
    sampled = query[:, :, rows.start : rows.stop : rows.step]
    for group, start, stop, weights in weight_tiles(sampled, key, rows, queries, valid, scale, tile):
        scores[:, group, : weights.shape[-1]] += weighted_column_sums(weights, weight[:, start:stop])
    scores *= key.shape[1] / query.shape[1]
    return scores if kind == "kv_heads" else scores.mean(1)


@torch.no_grad()
def probe_attention(
    query: Tensor, key: Tensor, valid: Tensor | None, scaling: float | None, softmax_over: ProbeScope
) -> Tensor:
    """Mean attention, over heads and queries, of a probe to the stored tokens.

    Parameters
    ----------
    query : Tensor
        Post-RoPE queries of the probe ``[B, H, P, D]``.
    key : Tensor
        Post-RoPE keys ``[B, G, N + P, D]``: of the stored tokens, then the probe's own.
    valid, scaling
        As in `lower_right_attention`.
    softmax_over : {"causal", "all", "memory"}
        Each query's softmax covers the stored tokens and the probe up to the query, all of the probe, or none of it.

    Returns
    -------
    Tensor
        ``[B, N]``.
    """
    batch, heads, queries, dim = query.shape
    groups, stored = key.shape[1], key.shape[2] - queries
    if softmax_over == "causal":
        return attention_scores(query, key, valid, scaling)[:, :stored] / queries
    visible = stored if softmax_over == "memory" else key.shape[2]
    scale = dim**-0.5 if scaling is None else scaling
    dtype = compute_dtype(query)
    scores = torch.zeros(batch, stored, dtype=dtype, device=query.device)
    rows = (query.to(dtype) * scale).reshape(batch, groups, -1, dim)
    for group in range(groups):
        logits = rows[:, group] @ key[:, group, :visible].to(dtype).transpose(-1, -2)
        if valid is not None:
            logits.masked_fill_(~valid[:, None, :visible], -torch.inf)
        scores += logits.softmax(-1)[..., :stored].sum(1)
    return scores / (heads * queries)


@torch.no_grad()
def row_lse(query: Tensor, key: Tensor, valid: Tensor | None, scale: float, tile: int = WEIGHT_TILE) -> Tensor:
    """Log-sum-exp of the logits of every query over the keys it sees, ``[B, H, Q]`` in at least float32."""
    batch, heads, queries, _ = query.shape
    groups = key.shape[1]
    lse = torch.empty(batch, groups, heads // groups, queries, dtype=compute_dtype(query), device=query.device)
    for group, start, stop, logits in logit_tiles(query, key, range(queries), queries, valid, scale, tile):
        lse[:, group, :, start:stop] = logits.logsumexp(-1)
    return lse.flatten(1, 2)


def scored_queries(queries: int, stride: int, window: int | None, valid: Tensor | None) -> range:
    """Range of queries that contains every query with a weight (see `query_weights`)."""
    if valid is not None:
        return range(queries)  # the weighted queries differ between samples
    return range(queries)[-window:] if window else range((queries - 1) % stride, queries, stride)


def query_weights(query: Tensor, keys: int, valid: Tensor | None, stride: int, window: int | None) -> Tensor:
    """Weight of each query in the scores: ``[B or 1, Q]``, 0 for queries that stride, window or padding leave out.

    The weights of a sample do not depend on how far the batch pads it.
    """
    queries = query.shape[2]
    order = torch.arange(queries, device=query.device)[None]
    real = torch.ones_like(order, dtype=torch.bool) if valid is None else valid[:, keys - queries :]
    count = real.sum(1, keepdim=True)
    if window is not None:
        return (real & (order >= count - window)).to(compute_dtype(query))
    # Counted from the end: the last query sees every key, so every key has a score.
    sampled = real & ((count - 1 - order) % stride == 0)
    return sampled * (count.to(compute_dtype(query)) / sampled.sum(1, keepdim=True).clamp_min(1))


def weighted_column_sums(weights: Tensor, weight: Tensor) -> Tensor:
    """Sum over heads and queries of ``[B, H, Q, K]``, each query counted `weight` ``[B or 1, Q]`` times: ``[B, K]``."""
    batch, heads, queries, _ = weights.shape
    rows = weight[:, None].expand(batch, heads, queries).reshape(batch, 1, -1)
    return (rows @ weights.flatten(1, 2))[:, 0]

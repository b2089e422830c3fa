"""Triton kernels for the attention scores of a chunk on CUDA: the column sums of causal attention, in one pass.

Fused attention does not store its weights, but it returns the log-sum-exp of every row, from which each weight can be
recomputed: a_k = Σ_q exp(q·k/√d − lse_q).

* `column_sums` sums the columns, given the log-sum-exp of the rows.
* `row_lse` computes the log-sum-exp, for attention that did not return it.

Both treat cache and chunk as one sequence of keys, read each key once for all query heads that share it, and never hold
more than a tile of weights. One program writes each number, without atomics: results are deterministic.

Importing this module needs Triton (ImportError without it), so the package does so on CUDA only. The tests
need no GPU, only Triton's interpreter: `pytest tests/memory/test_kernels.py`.
"""

# No `from __future__ import annotations`: Triton finds `tl.constexpr` parameters by their annotations.

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))
"""Inside the kernels exponentials are to base 2, the hardware's own instruction."""

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Triton's interpreter multiplies the bit patterns of bfloat16 (its documentation: not supported); see `_dot`."""


def column_sums(
    query: Tensor, key: Tensor, lse: Tensor, first: int, stride: int = 1, scaling: float | None = None
) -> Tensor:
    """Attention scores of each key from the rows that attend to it, averaged over the heads of its group.

    scores[b, g, k] = mean over the heads h of group g of Σ_r exp(scaling · query[b, h, r]·key[b, g, k] − lse[b, h, r])
    over the rows r with first + r · stride >= k: lower-right causal, cache and chunk at once.

    Parameters
    ----------
    query : Tensor
        Post-RoPE queries ``[B, H, R, D]``, float16, bfloat16 or float32, any strides. Row r is the query with index
        first + r · stride: with stride > 1 pass the sampled queries only.
    key : Tensor
        Post-RoPE keys ``[B, G, K, D]`` of the same dtype and device, any strides, H a multiple of G. Key k has
        index k. All of them are real: there is no padding mask.
    lse : Tensor
        Natural log-sum-exp of each row's scaled logits over the keys it sees, ``[B, H, R]``, float32, any strides.
    first : int
        Index of the first row, >= 0. Every row's own key is among the keys: first + (R − 1) · stride < K.
    stride : int
        Difference of index from one row to the next, >= 1.
    scaling : float, optional
        Factor on q·k; 1/√D by default.

    Returns
    -------
    Tensor
        ``[B, G, K]``, float32, no gradient. The scores of a group sum to R.
    """
    batch, _, rows, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    scores = torch.empty(batch, groups, keys, dtype=torch.float32, device=query.device)
    constants = _constants(query, key)
    # Triton launches on the current device, whatever device its arguments are on.
    with torch.cuda.device_of(query):
        _column_sums_kernel[triton.cdiv(keys, constants["KEYS"]), batch * groups](
            query,
            key,
            lse,
            scores,
            groups,
            rows,
            keys,
            first,
            stride,
            _scale(dim, scaling),
            *_strides(query, key, lse),
            **constants,
        )
    return scores


def row_lse(query: Tensor, key: Tensor, first: int, stride: int = 1, scaling: float | None = None) -> Tensor:
    """Natural log-sum-exp of every row's scaled logits over the keys it sees, as fused attention computes it.

    lse[b, h, r] = log Σ_k exp(scaling · query[b, h, r]·key[b, g(h), k]) over the keys k <= first + r · stride.

    Parameters
    ----------
    query, key, first, stride, scaling
        As in `column_sums`.

    Returns
    -------
    Tensor
        ``[B, H, R]``, float32, no gradient.
    """
    batch, heads, rows, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device)
    constants = _constants(query, key)
    with torch.cuda.device_of(query):
        _row_lse_kernel[triton.cdiv(rows * constants["SHARE"], constants["ROWS"]), batch * groups](
            query,
            key,
            lse,
            groups,
            rows,
            keys,
            first,
            stride,
            _scale(dim, scaling),
            *_strides(query, key),
            **constants,
        )
    return lse


def _scale(dim: int, scaling: float | None) -> float:
    """Factor on q·k that makes base-2 logits."""
    return (dim**-0.5 if scaling is None else scaling) * LOG2_E.value


def _strides(*tensors: Tensor) -> list[Any]:
    """Strides of one tensor after the other. Any, because as whole numbers pyright takes them for constants too."""
    return [stride for tensor in tensors for stride in tensor.stride()]


def _constants(query: Tensor, key: Tensor) -> dict[str, int]:
    """Compile-time constants of both kernels: heads that share a key, dimensions, tile sizes, launch options.

    The tiles fit the registers and the shared memory (99 KB) of every GPU since the A100, and are small enough that
    one sample occupies a whole large GPU.
    """
    dim = query.shape[-1]
    width = max(16, triton.next_power_of_2(dim))  # tensor cores multiply 16 at a time
    if query.dtype == torch.float32:
        # Exact float32 products run on CUDA cores, out of registers: smaller tiles, more threads.
        size, warps, stages = 32, 8, 2
    else:
        size, warps, stages = 64, 4, 3 if width <= 128 else 2
    # Set explicitly, because Triton's default differs between versions.
    launch = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return {"SHARE": query.shape[1] // key.shape[1], "DIM": dim, "WIDTH": width, "ROWS": size, "KEYS": size, **launch}


# The rows of all heads that share a key head are folded into one axis, row by row: folded row f is head f % SHARE of
# row f // SHARE. Indices never decrease along it, so the causal boundary is one point on it, and tiles are full even
# for a single query.
#
# Sizes and indices change with every chunk; a kernel must not be recompiled for those divisible by 16.
_CHANGING = ["rows", "keys", "first", "step"]


@triton.jit
def _tile_of_queries(
    query, folded, rows, stride_h, stride_r, stride_d, SHARE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """Queries ``[ROWS, WIDTH]`` of the folded rows; zero beyond the last row and the last dimension."""
    dims = tl.arange(0, WIDTH)
    # In 64 bits: a stride may be that of a whole chunk's projection.
    offset = (folded % SHARE).to(tl.int64) * stride_h + (folded // SHARE).to(tl.int64) * stride_r
    inside = (folded < rows * SHARE)[:, None] & (dims < DIM)[None, :]
    return tl.load(query + offset[:, None] + dims[None, :] * stride_d, mask=inside, other=0.0)


@triton.jit
def _tile_of_keys(key, index, keys, stride_k, stride_d, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Keys ``[KEYS, WIDTH]``; zero beyond the last key and the last dimension."""
    dims = tl.arange(0, WIDTH)
    inside = (index < keys)[:, None] & (dims < DIM)[None, :]
    return tl.load(key + index.to(tl.int64)[:, None] * stride_k + dims[None, :] * stride_d, mask=inside, other=0.0)


@triton.jit
def _dot(rows, columns):
    """Products of each of the rows with each of the columns, summed in float32."""
    if INTERPRETED:
        rows, columns = rows.to(tl.float32), columns.to(tl.float32)
    # "ieee" concerns float32 alone, which tensor cores would round to TF32.
    return tl.dot(rows, tl.trans(columns), input_precision="ieee")


@triton.jit(do_not_specialize=_CHANGING)
def _column_sums_kernel(
    query,
    key,
    lse,
    scores,
    groups,
    rows,
    keys,
    first,
    step,
    scale,
    query_b,
    query_h,
    query_r,
    query_d,
    key_b,
    key_g,
    key_k,
    key_d,
    lse_b,
    lse_h,
    lse_r,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program: the scores of KEYS keys of one group, from all folded rows that see any of them."""
    start = tl.program_id(0) * KEYS
    batch = (tl.program_id(1) // groups).to(tl.int64)
    group = (tl.program_id(1) % groups).to(tl.int64)
    query += batch * query_b + group * SHARE * query_h
    lse += batch * lse_b + group * SHARE * lse_h
    index = start + tl.arange(0, KEYS)
    tile_keys = _tile_of_keys(key + batch * key_b + group * key_g, index, keys, key_k, key_d, DIM, WIDTH)
    total = tl.zeros([KEYS], dtype=tl.float32)

    # Rows before `partial` see none of these keys, rows from `whole` on see all of them.
    partial = tl.minimum(tl.cdiv(tl.maximum(start - first, 0), step), rows) * SHARE
    whole = tl.minimum(tl.cdiv(tl.maximum(start + KEYS - 1 - first, 0), step), rows) * SHARE
    whole = partial + tl.cdiv(whole - partial, ROWS) * ROWS
    for begin in range(partial, whole, ROWS):
        folded = begin + tl.arange(0, ROWS)
        tile = _tile_of_queries(query, folded, rows, query_h, query_r, query_d, SHARE, DIM, WIDTH)
        weights = _weights(tile_keys, tile, lse, folded, rows, lse_h, lse_r, scale, SHARE)
        visible = index[:, None] <= (first + folded // SHARE * step)[None, :]
        total += tl.sum(tl.where(visible, weights, 0.0), axis=1)
    for begin in range(whole, rows * SHARE, ROWS):
        folded = begin + tl.arange(0, ROWS)
        tile = _tile_of_queries(query, folded, rows, query_h, query_r, query_d, SHARE, DIM, WIDTH)
        total += tl.sum(_weights(tile_keys, tile, lse, folded, rows, lse_h, lse_r, scale, SHARE), axis=1)
    scores += tl.program_id(1).to(tl.int64) * keys
    tl.store(scores + index, total / SHARE, mask=index < keys)


@triton.jit
def _weights(tile_keys, tile_queries, lse, folded, rows, lse_h, lse_r, scale, SHARE: tl.constexpr):
    """Attention weights ``[KEYS, ROWS]`` of a tile; zero beyond the last row."""
    offset = (folded % SHARE).to(tl.int64) * lse_h + (folded // SHARE).to(tl.int64) * lse_r
    # An infinite log-sum-exp is the row that gives nothing.
    lse = tl.load(lse + offset, mask=folded < rows * SHARE, other=float("inf")) * LOG2_E
    return tl.exp2(_dot(tile_keys, tile_queries) * scale - lse[None, :])


@triton.jit(do_not_specialize=_CHANGING)
def _row_lse_kernel(
    query,
    key,
    lse,
    groups,
    rows,
    keys,
    first,
    step,
    scale,
    query_b,
    query_h,
    query_r,
    query_d,
    key_b,
    key_g,
    key_k,
    key_d,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program: the log-sum-exp of ROWS folded rows of one group, over the keys any of them sees."""
    # The last rows see the most keys: they start first.
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    folded = begin + tl.arange(0, ROWS)
    batch = (tl.program_id(1) // groups).to(tl.int64)
    group = (tl.program_id(1) % groups).to(tl.int64)
    key += batch * key_b + group * key_g
    query += batch * query_b + group * SHARE * query_h
    tile = _tile_of_queries(query, folded, rows, query_h, query_r, query_d, SHARE, DIM, WIDTH)
    row_index = first + folded // SHARE * step
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)

    # Keys before `whole` are seen by all of these rows, keys from `stop` on by none.
    whole = (first + begin // SHARE * step + 1) // KEYS * KEYS
    stop = first + (tl.minimum(begin + ROWS, rows * SHARE) - 1) // SHARE * step + 1
    for start in range(0, whole, KEYS):
        tile_keys = _tile_of_keys(key, start + tl.arange(0, KEYS), keys, key_k, key_d, DIM, WIDTH)
        logits = _dot(tile, tile_keys) * scale
        top, total = _add(top, total, logits)
    for start in range(whole, stop, KEYS):
        index = start + tl.arange(0, KEYS)
        tile_keys = _tile_of_keys(key, index, keys, key_k, key_d, DIM, WIDTH)
        logits = _dot(tile, tile_keys) * scale
        visible = index[None, :] <= row_index[:, None]
        # Every row sees key 0, so that none has -inf for its top after the first tile.
        top, total = _add(top, total, tl.where(visible, logits, float("-inf")))
    offset = (tl.program_id(1).to(tl.int64) * SHARE + folded % SHARE) * rows + folded // SHARE
    tl.store(lse + offset, (top + tl.log2(total)) / LOG2_E, mask=folded < rows * SHARE)


@triton.jit
def _add(top, total, logits):
    """Largest base-2 logit so far, and the sum of the powers of all so far relative to it."""
    new = tl.maximum(top, tl.max(logits, axis=1))
    return new, total * tl.exp2(top - new) + tl.sum(tl.exp2(logits - new[:, None]), axis=1)

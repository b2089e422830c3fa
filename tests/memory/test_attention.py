"""Attention of a chunk over cache and itself, and its attention scores, are exact without an attention matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omnimem.memory import attention_scores, lower_right_attention
from oracles import dense_weights, largest_tensor, masked_softmax

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
MASS_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
SHAPES = pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 13), (8, 8), (7, 29)])
TILES = pytest.mark.parametrize("tile", [1, 3, 256])
HEADS = pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])


def states(queries: int, keys: int, heads: int, groups: int, dtype, batch: int = 2, dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = ((batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, dim + 2))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def padding(queries: int, keys: int, batch: int = 2) -> Tensor:
    """First sample whole; the second has padding in the middle of the memory and at the end of the chunk."""
    valid = torch.ones(batch, keys, dtype=torch.bool)
    past = keys - queries
    valid[1, past // 3 : 2 * past // 3] = False
    valid[1, keys - queries // 3 :] = False
    return valid


def dense_output(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling=None) -> Tensor:
    weights = dense_weights(query, key, valid, scaling)
    return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


@DTYPES
@SHAPES
@TILES
@HEADS
def test_chunk_attention_equals_dense_softmax(queries, keys, tile, heads, groups, dtype):
    query, key, value = states(queries, keys, heads, groups, dtype)
    output = lower_right_attention(query, key, value, tile=tile)
    expected = dense_output(query.double(), key.double(), value.double(), None)
    assert output.dtype == dtype
    assert (output - expected).abs().max() <= TOLERANCE[dtype]


@DTYPES
@SHAPES
@TILES
def test_padded_columns_are_never_attended_to(queries, keys, tile, dtype):
    query, key, value = states(queries, keys, 4, 2, dtype)
    valid = padding(queries, keys)
    output = lower_right_attention(query, key, value, valid, tile=tile)
    expected = dense_output(query.double(), key.double(), value.double(), valid)
    real = valid[:, None, keys - queries :, None].expand_as(output)
    assert (output - expected)[real].abs().max() <= TOLERANCE[dtype]
    assert output.isfinite().all()


def test_what_is_stored_in_padded_columns_does_not_matter():
    query, key, value = states(7, 29, 4, 2, torch.float64)
    valid = padding(7, 29)
    expected = lower_right_attention(query, key, value, valid)
    hole = ~valid[:, None, :, None]
    spoilt = lower_right_attention(query, key.masked_fill(hole, 1e3), value.masked_fill(hole, -1e6), valid)
    real = valid[:, None, -7:, None].expand_as(expected)
    assert torch.equal(spoilt[real], expected[real])


@pytest.mark.parametrize("scaling", [0.05, 1.0, 3.0])
def test_scaling_is_the_factor_on_query_times_key(scaling):
    query, key, value = states(7, 29, 4, 2, torch.float64)
    expected = dense_output(query, key, value, None, scaling)
    assert (lower_right_attention(query, key, value, scaling=scaling, tile=3) - expected).abs().max() <= 1e-12
    mass = dense_weights(query, key, None, scaling).sum(2).mean(1)
    assert (attention_scores(query, key, scaling=scaling, tile=3) - mass).abs().max() <= 1e-12


@pytest.mark.parametrize("tile", [1, 3, 256])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_equal_those_of_dense_attention(tile, padded):
    valid = padding(7, 19) if padded else None
    weight = torch.randn(2, 4, 7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    if padded:
        weight = weight * valid[:, None, -7:, None]
    gradients = []
    for function in (lambda *s: lower_right_attention(*s, valid, tile=tile), lambda *s: dense_output(*s, valid)):
        leaves = [state.requires_grad_() for state in states(7, 19, 4, 2, torch.float64)]
        (function(*leaves) * weight).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, dense in zip(*gradients, strict=True):
        assert (ours - dense).abs().max() <= 1e-12


@DTYPES
@SHAPES
@TILES
@HEADS
@pytest.mark.parametrize("padded", [False, True])
def test_attention_scores_are_the_column_sum_averaged_over_heads(queries, keys, tile, heads, groups, dtype, padded):
    query, key, _ = states(queries, keys, heads, groups, dtype)
    valid = padding(queries, keys) if padded else None
    mass = attention_scores(query, key, valid, tile=tile)
    expected = dense_weights(query.double(), key.double(), valid).sum(2).mean(1)
    assert mass.dtype == dtype
    assert (mass - expected).abs().max() <= MASS_TOLERANCE[dtype]


@DTYPES
@SHAPES
@TILES
@HEADS
@pytest.mark.parametrize("padded", [False, True])
def test_concat_attention_scores_are_one_softmax_over_concatenated_heads(
    queries, keys, tile, heads, groups, dtype, padded
):
    query, key, _ = states(queries, keys, heads, groups, dtype)
    valid = padding(queries, keys) if padded else None
    mass = attention_scores(query, key, valid, kind="concat", tile=tile)
    # All heads side by side are one vector; its product with the key's is the sum over heads.
    repeated = key.double().repeat_interleave(heads // groups, dim=1)
    wide_query = query.double().transpose(1, 2).flatten(2)
    wide_key = repeated.transpose(1, 2).flatten(2)
    logits = wide_query @ wide_key.transpose(1, 2) / (query.shape[-1] ** 0.5 * heads)
    expected = masked_softmax(logits[:, None], valid).sum((1, 2))
    assert (mass - expected).abs().max() <= MASS_TOLERANCE[dtype]


def test_attention_scores_of_all_keys_is_the_number_of_real_queries():
    query, key, _ = states(7, 29, 4, 2, torch.float64)
    valid = padding(7, 29)
    for kind in ("heads", "concat"):
        mass = attention_scores(query, key, valid, kind=kind)
        assert torch.allclose(mass.sum(1), valid[:, -7:].sum(1).double(), atol=1e-12)
        assert (mass[~valid] == 0).all()


def test_attention_scores_of_low_precision_states_are_summed_in_float32():
    query, key, _ = states(7, 29, 4, 2, torch.bfloat16)
    mass = attention_scores(query, key)
    assert mass.dtype == torch.float32
    expected = dense_weights(query.double(), key.double(), None).sum(2).mean(1)
    assert (mass - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_no_operation_makes_a_tensor_of_queries_times_keys(padded, backward):
    """The largest tensor stays what a tile needs: it does not grow with the queries once they exceed the tile."""
    heads, groups, tile = 4, 2, 16
    largest = []
    for queries in (16, 128):
        query, key, value = states(queries, 160, heads, groups, torch.float32, dim=4)
        valid = padding(queries, 160) if padded else None
        for leaf in (query, key, value):
            leaf.requires_grad_(backward)
        with largest_tensor() as seen:
            output = lower_right_attention(query, key, value, valid, tile=tile)
            if backward:
                output.sum().backward()
            for kind in ("heads", "concat"):
                attention_scores(query, key, valid, kind=kind, tile=tile)
        largest.append(seen[0])
        assert seen[0] <= 2 * heads * tile * 160
    assert largest[1] <= largest[0]


@pytest.mark.parametrize("stride", [2, 3, 4, 7, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_sampled_attention_scores_use_every_so_many_th_query_for_all(stride, padded):
    generator = torch.Generator().manual_seed(stride)
    query = torch.randn(2, 4, 23, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, 40, 8, generator=generator, dtype=torch.float64)
    valid = torch.ones(2, 40, dtype=torch.bool)
    if padded:
        valid[0, 10:15] = valid[0, -6:] = False
    weights = dense_weights(query, key, valid if padded else None).mean(1)
    expected = torch.zeros(2, 40, dtype=torch.float64)
    for sample, real in enumerate(valid[:, -23:].sum(1).tolist()):
        # Which queries are asked does not depend on how far a batch pads the sample.
        asked = list(range(real - 1, -1, -stride))
        expected[sample] = weights[sample, asked].sum(0) * real / len(asked)
    found = attention_scores(query, key, valid if padded else None, stride=stride, tile=3)
    assert (found - expected).abs().max() <= 1e-10

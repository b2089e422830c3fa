"""Output and attention scores from one pass equal attention and dense column sums, with exact gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from omnimem.memory import attention_scores, lower_right_attention
from omnimem.memory.attention import attention_with_scores
from oracles import dense_weights, largest_tensor

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
MASS_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
SHAPES = pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 13), (8, 8), (7, 29)])
TILES = pytest.mark.parametrize("tile", [1, 3, 256])
HEADS = pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
PADDED = pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
BATCH = 3


States = tuple[Tensor, Tensor, Tensor]


def states(queries: int, keys: int, heads: int = 4, groups: int = 2, dtype=torch.float64, dim: int = 8) -> States:
    generator = torch.Generator().manual_seed(queries * 100 + keys + heads)
    shapes = ((BATCH, heads, queries, dim), (BATCH, groups, keys, dim), (BATCH, groups, keys, dim + 2))
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return query, key, value


def trainable(*arguments, **options) -> States:
    """The same states, as leaves of a graph."""
    query, key, value = states(*arguments, **options)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def padding(queries: int, keys: int) -> Tensor:
    """The first sample is whole, the second has holes in memory and chunk, the third's chunk is padding throughout."""
    valid = torch.ones(BATCH, keys, dtype=torch.bool)
    past = keys - queries
    valid[1, past // 3 : 2 * past // 3] = False
    valid[1, keys - queries // 3 :] = False
    valid[2, past:] = False
    return valid


def dense_output(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling=None) -> Tensor:
    weights = dense_weights(query, key, valid, scaling)
    return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


def asked(valid: Tensor | None, queries: int, stride: int, window: int | None) -> list[dict[int, float]]:
    """For each sample the queries whose attention is asked for, and how much each counts."""
    rows = []
    for sample in range(BATCH):
        real = [q for q in range(queries) if valid is None or valid[sample, q - queries]]
        every = real[::-1][::stride]
        rows.append({q: len(real) / len(every) for q in every} if window is None else {q: 1.0 for q in real[-window:]})
    return rows


def group_mass(query: Tensor, key: Tensor, valid: Tensor | None, stride: int = 1, window: int | None = None) -> Tensor:
    """Column sums of the dense attention matrix over the queries asked, mean over the heads of a group."""
    weights = dense_weights(query.double(), key.double(), valid)
    weights = weights.unflatten(1, (key.shape[1], -1)).mean(2)
    mass = torch.zeros(weights.shape[0], weights.shape[1], weights.shape[3], dtype=torch.float64)
    for sample, rows in enumerate(asked(valid, query.shape[2], stride, window)):
        for row, count in rows.items():
            mass[sample] += count * weights[sample, :, row]
    return mass


def real_rows(valid: Tensor | None, output: Tensor) -> Tensor:
    if valid is None:
        return torch.ones_like(output, dtype=torch.bool)
    return valid[:, None, -output.shape[2] :, None].expand_as(output)


# ---- values ----------------------------------------------------------------------------------------------------------


@DTYPES
@SHAPES
@TILES
@HEADS
@PADDED
def test_output_is_dense_attention_and_attention_scores_its_column_sums(
    queries, keys, tile, heads, groups, dtype, padded
):
    query, key, value = states(queries, keys, heads, groups, dtype)
    valid = padding(queries, keys) if padded else None
    output, mass = attention_with_scores(query, key, value, valid, tile=tile)
    assert output.dtype == mass.dtype == dtype and mass.shape == (BATCH, groups, keys)
    expected = dense_output(query.double(), key.double(), value.double(), valid)
    assert (output - expected)[real_rows(valid, output)].abs().max() <= TOLERANCE[dtype]
    # A padded query's output means nothing, but it is the same nothing.
    assert (output - lower_right_attention(query, key, value, valid)).abs().max() <= TOLERANCE[dtype]
    assert (mass - group_mass(query, key, valid)).abs().max() <= MASS_TOLERANCE[dtype]
    if valid is not None:
        assert (mass.transpose(1, 2)[~valid] == 0).all()


@pytest.mark.parametrize("options", [{"stride": 2}, {"stride": 3}, {"stride": 100}, {"window": 1}, {"window": 4}])
@PADDED
@pytest.mark.parametrize("tile", [3, 256])
def test_sampled_and_windowed_attention_scores(options, padded, tile):
    """Every so many-th real query from the last back counts for those left out; a window is the last real queries."""
    query, key, value = states(11, 40)
    valid = padding(11, 40) if padded else None
    output, mass = attention_with_scores(query, key, value, valid, tile=tile, **options)
    expected = group_mass(query, key, valid, **options)
    assert (mass - expected).abs().max() <= 1e-10
    assert (attention_scores(query, key, valid, kind="kv_heads", tile=tile, **options) - expected).abs().max() <= 1e-10
    # Whom the attention scores asks changes nothing of the output.
    assert torch.equal(output, attention_with_scores(query, key, value, valid, tile=tile)[0])


def test_a_window_longer_than_the_chunk_asks_everyone():
    query, key, value = states(7, 29)
    for valid in (None, padding(7, 29)):
        everyone = attention_with_scores(query, key, value, valid)[1]
        assert torch.equal(attention_with_scores(query, key, value, valid, window=50)[1], everyone)
        assert (attention_scores(query, key, valid, kind="kv_heads", window=50) - everyone).abs().max() <= 1e-12


@DTYPES
@HEADS
@PADDED
@pytest.mark.parametrize("options", [{}, {"stride": 3}, {"window": 4}], ids=["all", "stride", "window"])
def test_mean_over_key_value_heads_is_the_mean_over_heads(heads, groups, dtype, padded, options):
    query, key, value = states(11, 40, heads, groups, dtype)
    valid = padding(11, 40) if padded else None
    mass = attention_with_scores(query, key, value, valid, tile=4, **options)[1]
    over_heads = attention_scores(query, key, valid, kind="heads", tile=4, **options)
    assert (mass.mean(1) - over_heads).abs().max() <= MASS_TOLERANCE[dtype]


@pytest.mark.parametrize("scaling", [0.05, 3.0])
def test_scaling_is_the_factor_on_query_times_key(scaling):
    query, key, value = states(7, 29)
    output, mass = attention_with_scores(query, key, value, scaling=scaling, tile=3)
    assert (output - dense_output(query, key, value, None, scaling)).abs().max() <= 1e-12
    expected = dense_weights(query, key, None, scaling).sum(2).unflatten(1, (2, 2)).mean(2)
    assert (mass - expected).abs().max() <= 1e-12


@PADDED
def test_low_precision_states_lose_nothing_but_the_rounding_of_the_output(padded):
    query, key, value = states(23, 60, dtype=torch.bfloat16)
    valid = padding(23, 60) if padded else None
    output, mass = attention_with_scores(query, key, value, valid, tile=5)
    assert output.dtype == torch.bfloat16 and mass.dtype == torch.float32
    expected = dense_output(query.double(), key.double(), value.double(), valid)
    wrong = (output.double() - expected)[real_rows(valid, output)].abs()
    assert (wrong <= 2.0**-8 * expected[real_rows(valid, output)].abs() + 1e-5).all()
    assert (mass - group_mass(query, key, valid)).abs().max() <= 1e-5


def test_what_is_stored_in_padded_columns_does_not_matter():
    query, key, value = states(7, 29)
    valid = padding(7, 29)
    hole = ~valid[:, None, :, None]
    expected = attention_with_scores(query, key, value, valid)
    spoilt = attention_with_scores(query, key.masked_fill(hole, 1e3), value.masked_fill(hole, -1e6), valid)
    real = real_rows(valid, expected[0])
    assert torch.equal(spoilt[0][real], expected[0][real])
    assert torch.equal(spoilt[1], expected[1])


def test_states_in_the_layout_of_a_decoder_are_read_as_they_are():
    """Queries come as a transposed view of [B, Q, H, D]."""
    query, key, value = states(7, 29)
    expected = attention_with_scores(query, key, value, tile=3)
    views = [state.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for state in (query, key, value)]
    assert not views[0].is_contiguous()
    found = attention_with_scores(views[0], views[1], views[2], tile=3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found[0].sum().backward()  # the gradient that arrives is an expanded scalar


# ---- gradients -------------------------------------------------------------------------------------------------------


@PADDED
@pytest.mark.parametrize("tile", [2, pytest.param(256, marks=pytest.mark.long)])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"window": 2}], ids=["all", "stride", "window"])
def test_gradients_of_output_and_attention_scores_equal_finite_differences(padded, tile, options):
    leaves = trainable(4, 7, heads=4, groups=2, dim=2)
    valid = padding(4, 7) if padded else None
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention_with_scores(q, k, v, valid, tile=tile, **options),
        leaves,
        eps=1e-6,
        atol=1e-7,
        rtol=1e-5,
    )


@HEADS
@PADDED
@pytest.mark.parametrize("tile", [1, 3, 256])
def test_gradients_equal_those_of_attention_alone_and_of_the_dense_matrix(heads, groups, padded, tile):
    valid = padding(7, 19) if padded else None
    generator = torch.Generator().manual_seed(5)
    shapes = ((BATCH, heads, 7, 10), (BATCH, groups, 19))
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def ours(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return attention_with_scores(query, key, value, valid, tile=tile)

    def alone(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        return lower_right_attention(query, key, value, valid), None

    def dense(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        columns = dense_weights(query, key, valid).sum(2).unflatten(1, (groups, -1)).mean(2)
        return dense_output(query, key, value, valid), columns

    def gradients(function, with_output: bool, with_mass: bool) -> list[Tensor]:
        leaves = trainable(7, 19, heads, groups)
        output, mass = function(*leaves)
        loss = torch.zeros((), dtype=torch.float64)
        if with_output:
            loss = loss + (output * weights[0])[real_rows(valid, output)].sum()
        if with_mass:
            loss = loss + (mass * weights[1]).sum()
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]

    pairs = [(alone, True, False), (dense, True, False), (dense, False, True), (dense, True, True)]
    for reference, with_output, with_mass in pairs:
        expected = gradients(reference, with_output, with_mass)
        for mine, theirs in zip(gradients(ours, with_output, with_mass), expected, strict=True):
            assert (mine - theirs).abs().max() <= 1e-12


def test_gradients_of_low_precision_states_are_summed_in_float32():
    leaves = trainable(64, 96, dtype=torch.bfloat16)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    attention_with_scores(*leaves, tile=5)[0].float().square().sum().backward()
    attention_with_scores(exact[0], exact[1], exact[2])[0].to(torch.bfloat16).float().square().sum().backward()
    for leaf, reference in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and reference.grad is not None and leaf.grad.dtype == torch.bfloat16
        # bf16 steps of 2^-8, and the outputs that are squared may be one such step apart.
        assert (leaf.grad.double() - reference.grad).norm() <= 2.0**-7 * reference.grad.norm()


@PADDED
def test_gradients_survive_a_non_reentrant_checkpoint(padded):
    valid = padding(7, 19) if padded else None
    found = []
    for recomputed in (False, True):
        leaves = trainable(7, 19)

        def layer(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            return attention_with_scores(query * 2, key * 3, value, valid, tile=3)

        output, mass = checkpoint(layer, *leaves, use_reentrant=False) if recomputed else layer(*leaves)
        (output.square().sum() + mass.square().sum()).backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_attention_scores_exist_without_gradients_too():
    query, key, value = states(7, 29)
    with torch.no_grad():
        output, mass = attention_with_scores(query.requires_grad_(), key, value)
    assert not output.requires_grad and not mass.requires_grad


# ---- memory ----------------------------------------------------------------------------------------------------------


def saved_bytes(queries: int, keys: int, padded: bool, function) -> int:
    """Bytes autograd keeps for the backward, each storage counted once."""
    leaves = trainable(queries, keys, dtype=torch.float32)
    valid = padding(queries, keys) if padded else None
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function(*leaves, valid)
    assert kept is not None
    return sum(storages.values())


@PADDED
def test_only_the_inputs_are_saved_for_the_backward_pass(padded):
    def in_one_pass(*arguments):
        return attention_with_scores(*arguments, tile=16)

    for queries, keys in ((16, 64), (64, 256), (256, 512)):
        inputs = sum(state.nbytes for state in states(queries, keys, dtype=torch.float32))
        # Besides the inputs: how much each query counts, and which columns are real.
        facts = BATCH * (4 * queries + keys)
        assert saved_bytes(queries, keys, padded, in_one_pass) <= inputs + facts
    dense = saved_bytes(256, 512, padded, lambda *arguments: dense_output(*arguments))
    assert dense > BATCH * 4 * 256 * 512 * 4, "the measurement sees a whole attention matrix"


@PADDED
@pytest.mark.parametrize("options", [{}, {"stride": 4}, {"window": 8}], ids=["all", "stride", "window"])
def test_no_operation_makes_a_tensor_of_queries_times_keys(padded, options):
    """Forward and backward: the largest tensor stays what a tile needs, however many the queries."""
    heads, groups, tile, keys = 4, 2, 8, 256
    largest = []
    for queries in (8, 64, 256):
        leaves = trainable(queries, keys, heads, groups, torch.float32, dim=4)
        valid = padding(queries, keys) if padded else None
        with largest_tensor() as seen:
            output, mass = attention_with_scores(*leaves, valid, tile=tile, **options)
            (output.sum() + mass.square().sum()).backward()
        largest.append(seen[0])
    assert largest[0] >= BATCH * heads // groups * tile * keys, "the watch sees the weights of a tile"
    inputs = BATCH * heads * 256 * 6
    assert max(largest) <= max(BATCH * heads // groups * tile * keys, inputs)

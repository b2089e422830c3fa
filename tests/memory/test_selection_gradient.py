"""The gradient that teaches what to keep: soft gates, the margin of what was just evicted, and an unchanged forward."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from omnimem.budget import LayerBudget
from omnimem.errors import OmniMemError
from omnimem.forward import Stream
from omnimem.memory import SelectionGradient, lower_right_attention
from omnimem.memory import margin as margin_module
from omnimem.memory.margin import Margin
from omnimem.modality import EVICTABLE, TEXT
from omnimem.selection import SELECTION_METHODS, Candidates, build_selection
from omnimem.selection.gates import gates
from omnimem.selection.topk import topk_mask
from omnimem.token_metadata import TokenMetadata
from oracles import (
    batch_parts,
    held,
    idle_part,
    kept,
    offline,
    profile,
    run,
    same,
    slopes_of,
    stream,
    stream_parts,
    text_part,
)
from small_decoder import (  # noqa: F401
    BUDGETS,
    EVERY,
    OTHER_SIZES,
    SIZES,
    TARGETS,
    ExactNorm,
    Replay,
    answer,
    answer_loss,
    distance,
    head,
    lora_weights,
    model,
    new_cache,
    streamed_loss,
    streams,
    weight_gradients,
)

THRESHOLDS = ("boundary", "bisection")


# ---- gates -----------------------------------------------------------------------------------------------------------


def crowd(rows: int = 4, width: int = 9, seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Scores ``[rows, width]`` and who competes; the last row has a single member."""
    generator = torch.Generator().manual_seed(seed)
    score = spread * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    member = torch.rand(rows, width, generator=generator) < 0.8
    member[:-1, :5] = True
    member[-1] = False
    member[-1, 2] = True
    return score, member


@pytest.mark.parametrize("count", [1, 2, 4, 5])
@pytest.mark.parametrize("temperature", [0.03, 0.3, 1.0])
def test_bisected_gates_sum_to_the_places_there_are(count, temperature):
    score, member = crowd()
    gate = gates(score, member, count, temperature, "bisection")
    expected = member.sum(1).clamp_max(count).double()
    assert (gate.sum(1) - expected).abs().max() <= 1e-6
    # In float32, the type of scores in training, as nearly as its digits allow.
    coarse = gates(score.float(), member, count, temperature, "bisection")
    assert coarse.dtype == torch.float32 and (coarse.sum(1) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_gates_lie_between_0_and_1_in_the_order_of_the_scores(threshold):
    score, member = crowd()
    gate = gates(score, member, 3, 0.5, threshold)
    assert (gate >= 0).all() and (gate <= 1).all()
    assert (gate[~member] == 0).all() and (gate[member] > 0).all()
    for row in range(len(score)):
        places = member[row].nonzero()[:, 0]
        assert torch.equal(gate[row, places].argsort(), score[row, places].argsort()) or len(places) <= 3


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_where_the_budget_suffices_gates_are_one_without_a_gradient(threshold):
    score, member = crowd()
    score.requires_grad_()
    gate = gates(score, member, 5, 0.3, threshold)
    roomy = member.sum(1) <= 5
    assert roomy.any() and not roomy.all()
    assert torch.equal(gate[roomy], member[roomy].double())
    weights = torch.randn(gate.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (slope,) = torch.autograd.grad((gate * weights).sum(), score)
    assert (slope[roomy] == 0).all() and (slope[~member] == 0).all()
    assert (slope[~roomy].abs().amax(1) > 0).all()


@pytest.mark.parametrize("temperature", [0.1, 0.3, 1.0])
def test_the_bisected_threshold_moves_as_finite_differences_say(temperature):
    score, member = crowd()
    score.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gates(x, member, 3, temperature, "bisection"), score, atol=1e-6)
    # One place more for one candidate is one fewer for the others: the sum does not move.
    (slope,) = torch.autograd.grad(gates(score, member, 3, temperature, "bisection").sum(), score)
    assert slope.abs().max() <= 1e-12


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("temperature", [0.1, 0.3, 1.0])
def test_the_threshold_moves_with_every_score_by_its_share_of_openness(threshold, temperature):
    """The Jacobian is g'_k/T · (δ_kj − w_j) with g' = g(1 − g) and w_j = g'_j / Σ g', written out in plain numbers."""
    score, member = crowd(rows=3)
    count = 3
    jacobian: Any = torch.autograd.functional.jacobian(lambda x: gates(x, member, count, temperature, threshold), score)
    for row in range(len(score)):
        places = member[row].nonzero()[:, 0].tolist()
        x = {k: float(score[row, k]) for k in places}
        tau = by_hand_threshold(list(x.values()), count, temperature, threshold)
        gate = {k: 1 / (1 + math.exp(-(x[k] - tau) / temperature)) for k in places}
        open_ = {k: g * (1 - g) for k, g in gate.items()}
        total = math.fsum(open_.values())
        for k in range(score.shape[1]):
            for j in range(score.shape[1]):
                expected = 0.0
                if len(places) > count and k in x and j in x:
                    expected = open_[k] / temperature * ((k == j) - open_[j] / total)
                assert abs(float(jacobian[row, k, row, j]) - expected) <= 1e-9
        others = [other for other in range(len(score)) if other != row]
        assert (jacobian[row][:, others] == 0).all(), "rows know nothing of each other"


def by_hand_threshold(x: list[float], count: int, temperature: float, threshold: str) -> float:
    ordered = sorted(x, reverse=True)
    if len(x) <= count:
        return 0.0
    if threshold == "boundary":
        return (ordered[count - 1] + ordered[count]) / 2
    low, high = ordered[-1] - 50, ordered[0] + 50
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        total = math.fsum(1 / (1 + math.exp(-(one - middle) / temperature)) for one in x)
        low, high = (middle, high) if total > count else (low, middle)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("count", [1, 3, 4])
def test_cold_gates_are_the_hard_top_k(threshold, count):
    score, member = crowd()
    stays = topk_mask(score, member, count).double()
    for temperature, tolerance in ((1e-2, 0.5), (1e-3, 1e-4), (1e-6, 1e-9)):
        assert (gates(score, member, count, temperature, threshold) - stays).abs().max() <= tolerance


@pytest.mark.parametrize("temperature", [0.01, 0.3, 3.0])
def test_retained_candidates_have_gates_of_at_least_one_half(temperature):
    for seed in range(20):
        score, member = crowd(seed=seed)
        stays = topk_mask(score, member, 3)
        assert torch.equal(gates(score, member, 3, temperature) >= 0.5, stays)
        # With ties rank goes on to decide; nothing above one half is lost, nothing below it kept.
        tied = score.round()
        stays, gate = topk_mask(tied, member, 3), gates(tied, member, 3, temperature)
        assert not (stays & (gate < 0.5)).any() and not (member & ~stays & (gate > 0.5)).any()


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 3, 6, 9])
def test_gates_and_their_gradients_stay_finite(threshold, dtype, count):
    """Extreme, equal and missing candidates, no places and more places than candidates."""
    score = torch.tensor(
        [
            [1e3, -1e3, 1e3, -1e3, 0.0, 5.0],
            [1e3, 1e3, 1e3, 1e3, 1e3, -1e3],
            [0.7, 0.7, 0.7, 0.7, 0.7, 0.7],
            [-27.6, -27.6, -27.6, -27.6, 0.0, 0.0],
            [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        ],
        dtype=dtype,
        requires_grad=True,
    )
    member = torch.ones(5, 6, dtype=torch.bool)
    member[4] = False
    for temperature in (0.01, 0.3):
        gate = gates(score, member, count, temperature, threshold)
        (slope,) = torch.autograd.grad(gate.square().sum(), score)
        assert gate.isfinite().all() and slope.isfinite().all()
        assert (gate >= 0).all() and (gate <= 1).all()
        assert (gate[4] == 0).all() and (slope[4] == 0).all()
        if 0 < count < 6 and threshold == "bisection":
            assert (gate[2] - count / 6).abs().max() <= 1e-4, "equals share"
        if count == 0:
            assert (gate == 0).all() and (slope == 0).all(), "where nothing can stay there is nothing to learn"


def test_scores_of_one_candidate_or_none():
    for threshold in THRESHOLDS:
        for count in (0, 1, 2):
            single = gates(torch.tensor([[2.0]]), torch.ones(1, 1, dtype=torch.bool), count, 0.3, threshold)
            assert single.shape == (1, 1) and single.isfinite().all()
            assert count == 0 or single == 1


# ---- the forward pass is that of inference ---------------------------------------------------------------------------

SETTINGS = [
    SelectionGradient(temperature=0.05, margin=1, gradient_scale=16.0),
    SelectionGradient(temperature=0.3, margin=3, gradient_scale=4.0, threshold="bisection"),
    SelectionGradient(temperature=2.0, margin=None, gradient_scale=64.0, through_attention=True),
    SelectionGradient(temperature=1.0, margin=100, gradient_scale=0.0, threshold="bisection", through_attention=True),
]


def watched(model, gradient, samples: int, **options) -> tuple[list[Tensor], list, list]:
    """Everything a stream with questions in between says and keeps."""
    cache = new_cache(gradient, **options)
    flow = Stream(offline(model), cache)
    parts = streams(samples)
    hidden, kept_sets = [flow.forward(parts[0], text=True)], []
    for part in parts[1:]:
        flow.step(part)
        hidden.append(answer(model, cache))
        kept_sets.append([kept(cache, layer, row) for layer in range(3) for row in range(samples)])
    return [one.detach() for one in hidden], kept_sets, held(cache)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("method", ["omnimem", "similarity_only", "release"])
@pytest.mark.parametrize("gradient", SETTINGS, ids=lambda one: f"T{one.temperature}-M{one.margin}-{one.threshold}")
def test_the_forward_pass_is_bit_for_bit_that_of_inference(model, gradient, method, samples):
    options: dict[str, Any] = {"method": method}
    if method != "omnimem":
        gradient = replace(gradient, through_attention=False)  # there is no attention scores it could go through
    if method != "similarity_only":
        options = {"lambda": 1.0} if method == "omnimem" else {"variant": "release"}
    learning = watched(model, gradient, samples, **options)
    hard = watched(model, None, samples, **options)
    with torch.no_grad():
        there = watched(model, gradient, samples, **options)
        inference = watched(model, None, samples, **options)
    assert sum(map(len, hard[1][-1])) < samples * 3 * 40, "something was evicted"
    for other in (there, hard, inference):
        assert learning[1] == other[1]
        assert same(learning[0], other[0]) and same(learning[2], other[2])


@pytest.mark.parametrize("grad", [False, True])
def test_without_a_selection_gradient_nothing_of_it_exists(model, grad):
    cache = new_cache(None)
    with torch.set_grad_enabled(grad):
        for number, part in enumerate(streams(1)):
            run(model, cache, part, text=number == 0)
            cache.compress()
            assert all(layer.margin is None and not layer.learning for layer in cache.layers)
            assert {name for _, name in cache.differentiable_state} == {"keys", "values"}


def test_the_margin_is_that_of_the_last_step(model):
    """Without a graph too: the forward pass records the margin for the backward pass."""
    parts = streams(1)
    with torch.no_grad():
        cache = new_cache(SelectionGradient(margin=3))
        for number, part in enumerate(parts):
            run(model, cache, part, text=number == 0)
            cache.compress()
            assert not any(tensor.requires_grad for tensor in cache.differentiable_state.values())
            if number:
                assert all(1 <= layer.margin.gates.shape[1] <= 3 for layer in cache.layers)
    cache.reset()
    assert all(layer.margin is None for layer in cache.layers)


def test_a_question_does_not_change_the_margin(model):
    cache = new_cache()
    stream(model, cache, streams(2)[:3])
    before = [layer.margin for layer in cache.layers]
    answer(model, cache)
    assert all(layer.margin is margin for layer, margin in zip(cache.layers, before, strict=True))


# ---- the term whose value is zero ------------------------------------------------------------------------------------


def attention_inputs(batch: int, queries: int, past: int, evicted: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    heads, groups, dim = 6, 2, 8
    return SimpleNamespace(
        query=normal(batch, heads, queries, dim),
        key=normal(batch, groups, past + queries, dim),
        value=normal(batch, groups, past + queries, dim),
        gates=torch.rand(batch, evicted, generator=generator, dtype=torch.float64).requires_grad_(),
        keys=normal(batch, groups, evicted, dim),
        values=normal(batch, groups, evicted, dim),
    )


def padded(batch: int, columns: int, queries: int) -> Tensor:
    """Columns that are real: the second sample has padding in its past and at its end."""
    valid = torch.ones(batch, columns, dtype=torch.bool)
    if batch > 1:
        valid[1, columns - queries - 3 : columns - queries] = False
        valid[1, -2:] = False
    return valid


def dense(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention with the whole matrix: output and log-sum-exp; a padded query also sees itself."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    queries, keys = query.shape[2], key.shape[2]
    row = torch.arange(keys - queries, keys)[:, None]
    column = torch.arange(keys)[None]
    real = torch.ones(len(query), keys, dtype=torch.bool) if valid is None else valid
    seen = (column <= row) & (real[:, None, :] | (column == row))
    logits = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen[:, None], -torch.inf)
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


def explicit_change(output, lse, query, keys, values, scale) -> Tensor:
    """σ(s − ℓ)·(v − o) of every query and margin token: ``[B, H, Q, M, D]``."""
    repeat = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
    weight = torch.sigmoid(query @ keys.transpose(-1, -2) * scale - lse[..., None])
    return weight[..., None] * (values[:, :, None] - output[:, :, :, None])


CASES = pytest.mark.parametrize(
    ("batch", "queries", "past", "evicted", "tile"),
    [(1, 7, 5, 4, 256), (1, 7, 5, 4, 3), (2, 9, 6, 5, 4), (2, 1, 8, 3, 256), (1, 5, 0, 1, 1), (2, 300, 20, 3, 256)],
)


@CASES
@pytest.mark.parametrize("scale", [8**-0.5, 0.9])
def test_the_zero_valued_term_has_the_gradient_of_its_formula(monkeypatch, batch, queries, past, evicted, tile, scale):
    monkeypatch.setattr(margin_module, "TILE", tile)
    given = attention_inputs(batch, queries, past, evicted)
    query, key, value, keys, values = given.query, given.key, given.value, given.keys, given.values
    valid = padded(batch, past + queries, queries) if batch > 1 else None
    gain = 2.5
    upstream = torch.randn(query.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def loss(output: Tensor) -> Tensor:
        return (output.square() * upstream + output.sin()).sum()

    output = lower_right_attention(query, key, value, valid, scale)
    reached = Margin(keys, values, given.gates, gain).attach_gradient(output, query, key, valid, scale)
    assert torch.equal(reached, output)
    leaves = [given.gates, query, key, value]
    ours = torch.autograd.grad(loss(reached), leaves, retain_graph=True)

    plain, lse = dense(query, key, value, valid, scale)
    change = explicit_change(plain, lse, query, keys, values, scale).detach()
    term = gain * torch.einsum("bm,bhqmd->bhqd", given.gates - given.gates.detach(), change)
    assert (term == 0).all()
    theirs = torch.autograd.grad(loss(plain + term), leaves)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-10 * max(1.0, float(other.abs().max()))
        assert other.abs().max() > 0

    # What the rest of the graph gets is what it gets without the term, and the margin's own states get nothing.
    without = torch.autograd.grad(loss(output), leaves[1:], retain_graph=True)
    assert all(map(torch.equal, ours[1:], without))
    assert torch.autograd.grad(loss(reached), [keys, values], allow_unused=True) == (None, None)


def test_the_gradient_of_a_gate_is_the_change_of_the_output_had_its_token_been_retained():
    """Against attention done again with the one token put back, no formula in between."""
    given = attention_inputs(1, 6, 5, 4, seed=1)
    query, key, value = given.query.detach(), given.key.detach(), given.value.detach()
    scale = 8**-0.5
    upstream = torch.randn(query.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    output = lower_right_attention(query, key, value, None, scale).requires_grad_()
    reached = Margin(given.keys, given.values, given.gates, 1.0).attach_gradient(output, query, key, None, scale)
    (slope,) = torch.autograd.grad((reached * upstream).sum(), given.gates)
    for k in range(4):
        # At the very front every query sees it.
        more_keys = torch.cat((given.keys[:, :, k : k + 1].detach(), key), 2)
        more_values = torch.cat((given.values[:, :, k : k + 1].detach(), value), 2)
        restored, _ = dense(query, more_keys, more_values, None, scale)
        assert abs(float(slope[0, k] - ((restored - output.detach()) * upstream).sum())) <= 1e-10


def test_a_token_that_every_query_would_attend_to_gives_a_bounded_gradient():
    """σ saturates where the tangent exp(s − ℓ) would explode: the change is v − o, no more."""
    given = attention_inputs(1, 6, 5, 1, seed=1)
    query = given.query.detach().abs()
    key, value = given.key.detach(), given.value.detach()
    output = lower_right_attention(query, key, value, None, 1.0).requires_grad_()
    for factor, looked_at in ((1e5, 1.0), (-1e5, 0.0)):
        keys = torch.full_like(given.keys, factor)
        reached = Margin(keys, given.values, given.gates, 1.0).attach_gradient(output, query, key, None, 1.0)
        (slope,) = torch.autograd.grad(reached.sum(), given.gates)
        whole = (given.values.detach().repeat_interleave(3, 1) - output.detach()).sum()
        assert abs(float(slope - looked_at * whole)) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gates_of_half_precision_states_learn_in_float32(dtype):
    given = attention_inputs(2, 9, 6, 5)
    scale = 8**-0.5
    slopes = []
    for kind in (torch.float64, dtype):
        query, key, value, keys, values = (
            one.detach().to(dtype).to(kind) for one in (given.query, given.key, given.value, given.keys, given.values)
        )
        gate = given.gates.detach().float().to(torch.promote_types(kind, torch.float32)).requires_grad_()
        output = lower_right_attention(query, key, value, None, scale).requires_grad_()
        reached = Margin(keys, values, gate, 4.0).attach_gradient(output, query, key, None, scale)
        (slope,) = torch.autograd.grad(reached.sum(), gate)
        assert slope.dtype == gate.dtype and reached.dtype == kind
        slopes.append(slope.double())
    assert distance(slopes[1:], slopes[:1]) <= (2e-2 if dtype == torch.bfloat16 else 1e-5)


# ---- the whole path --------------------------------------------------------------------------------------------------

SURROGATES = [
    ("similarity_only", {}, SelectionGradient(temperature=0.3, threshold="bisection")),
    (
        "similarity_only",
        {"neighbours": "modality"},
        SelectionGradient(temperature=1.0, gradient_scale=2.0, threshold="bisection"),
    ),
    ("omnimem", {"lambda": 1.0}, SelectionGradient(temperature=0.5, threshold="bisection", through_attention=True)),
    (
        "omnimem",
        {"lambda": 0.5, "query_stride": 1, "accumulation": "ema", "factor": "sqrt"},
        SelectionGradient(temperature=0.5, threshold="bisection", through_attention=True),
    ),
]


class Surrogate:
    """`Margin.attach_gradient` as an ordinary function whose value does move: o + c·Σ (g − g0)·[σ(s − ℓ)·(v − o)].

    The first stream records g0 and what stands in brackets; later ones, at other weights, use what was recorded.
    """

    def __init__(self, monkeypatch):
        self.recorded: list[tuple[Tensor, Tensor]] = []
        self.place: int | None = None
        monkeypatch.setattr(Margin, "attach_gradient", lambda margin, *states: self(margin, *states))

    def __call__(self, margin: Margin, output: Tensor, query, key, valid, scale) -> Tensor:
        if self.place is None:
            with torch.no_grad():
                _, lse = dense(query, key, key, valid, scale)
                change = explicit_change(output, lse, query, margin.keys, margin.values, scale)
            self.recorded.append((margin.gates.detach(), change))
            at, change = self.recorded[-1]
        else:
            self.place += 1
            at, change = self.recorded[self.place - 1]
        return output + margin.gradient_scale * torch.einsum("bm,bhqmd->bhqd", margin.gates - at, change)

    def rewind(self):
        self.place = 0


@pytest.mark.parametrize("samples", [2, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize(("method", "options", "gradient"), SURROGATES)
def test_gradients_equal_finite_differences_of_what_the_term_stands_for(
    model, monkeypatch, samples, method, options, gradient
):
    """Kept sets and brackets frozen, gates free: through scores, thresholds, attention scores and several evictions."""
    parts, weights = streams(samples), lora_weights(model)
    ours = weight_gradients(model, new_cache(gradient, method, **options), parts)
    replay, surrogate = Replay(monkeypatch), Surrogate(monkeypatch)
    loss = streamed_loss(model, new_cache(gradient, method, **options), parts)
    explicit = list(torch.autograd.grad(loss, weights))
    assert len(surrogate.recorded) > 12, "questions and chunks in several layers have looked at margins"
    assert distance(ours, explicit) <= 1e-10
    hard = weight_gradients(model, new_cache(None, method, **options), parts)
    assert distance(explicit, hard) > 1e-2

    generator = torch.Generator().manual_seed(1)

    @torch.enable_grad()
    def replayed() -> float:
        replay.rewind()
        surrogate.rewind()
        return streamed_loss(model, new_cache(gradient, method, **options), parts).item()

    with slopes_of(weights, replayed) as slope:
        for _ in range(2):
            direction = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
            expected = sum(float((g * d).sum()) for g, d in zip(ours, direction, strict=True))
            assert expected != 0
            assert abs(slope(direction, 2e-5) - expected) <= 1e-6 * abs(expected)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("attention", [False, True])
def test_the_state_of_a_cache_names_all_that_gradients_flow_through(model, samples, attention):
    """Finite differences of the gates after a compression with respect to what was held before it."""
    gradient = SelectionGradient(threshold="bisection", through_attention=attention)
    cache, parts = new_cache(gradient, lambda_=1.0), streams(samples)
    stream(model, cache, parts[:3])
    assert all(layer.margin is not None for layer in cache.layers)
    names = {"keys", "values", "features", "gates", *(["attention_scores"] if attention else [])}
    assert cache.differentiable_state.keys() == {(layer, name) for layer in range(3) for name in names}
    run(model, cache, parts[3])
    for layer in cache.layers:
        layer.pad_scores()
    before = cache.snapshot()
    decided = cache.compress()

    def opened(*states: Tensor) -> tuple[Tensor, ...]:
        cache.restore(before)
        cache.differentiable_state = dict(zip(order, states, strict=True))
        assert all(one is other for one, other in zip(cache.differentiable_state.values(), states, strict=True))
        cache.compress(decided)
        return tuple(layer.margin.gates for layer in cache.layers)

    cache.restore(before)
    order = list(cache.differentiable_state)
    leaves = [state.detach().requires_grad_() for state in cache.differentiable_state.values()]
    assert all(gates.requires_grad for gates in opened(*leaves))
    assert torch.autograd.gradcheck(opened, leaves, fast_mode=True, atol=1e-7)
    slopes = torch.autograd.grad(
        torch.stack([one.square().sum() for one in opened(*leaves)]).sum(), leaves, allow_unused=True
    )
    reached = sum(slope is not None and bool(slope.abs().max() > 0) for slope in slopes)
    assert reached == (6 if attention else 3), "features, and the mass"


@pytest.mark.parametrize("attention", [False, True])
def test_the_gradient_differs_from_the_hard_one_by_the_scale(model, attention):
    parts = streams(1)
    options = {"method": "omnimem", "lambda": 1.0}
    hard = weight_gradients(model, new_cache(None, **options), parts)
    silent = weight_gradients(
        model, new_cache(SelectionGradient(gradient_scale=0.0, through_attention=attention), **options), parts
    )
    taught = weight_gradients(model, new_cache(SelectionGradient(through_attention=attention), **options), parts)
    assert distance(silent, hard) <= 1e-12
    assert distance(taught, hard) > 1e-2


@pytest.mark.parametrize("attention", [False, True])
def test_gradients_of_the_gates_are_proportional_to_the_scale(model, attention):
    parts = streams(1)[:2]

    def at(gain: float) -> list[Tensor]:
        gradient = SelectionGradient(gradient_scale=gain, through_attention=attention)
        return weight_gradients(model, new_cache(gradient, lambda_=1.0), parts, asked=(1,))

    hard, double, eightfold = at(0.0), at(2.0), at(8.0)
    steps = [[a - b for a, b in zip(one, hard, strict=True)] for one in (double, eightfold)]
    assert max(float(one.abs().max()) for one in steps[0]) > 1e-6
    assert distance([4 * one for one in steps[0]], steps[1]) <= 1e-10


def test_without_eviction_the_selection_has_no_gradient(model):
    ample = profile((99, 99), (99, 99), (99, 99))
    taught, hard = (weight_gradients(model, new_cache(one, budgets=ample), streams(2)) for one in (EVERY, None))
    assert all(map(torch.equal, taught, hard))


def test_a_gradient_through_the_attention_attention_scores_reaches_further(model):
    parts = streams(2)
    found = {}
    for attention in (False, True):
        gradient = SelectionGradient(through_attention=attention)
        found[attention] = weight_gradients(model, new_cache(gradient, lambda_=1.0), parts)
        assert all(one.isfinite().all() for one in found[attention])
    assert distance(found[True], found[False]) > 1e-3
    # In the first layer the similarity of the embeddings has nothing to learn; the attention to them has.
    cache = new_cache(SelectionGradient(through_attention=True), lambda_=1.0)
    stream(model, cache, parts)
    assert cache.layers[0].margin.gates.requires_grad and cache.layers[0].attention_scores.requires_grad
    cache = new_cache(SelectionGradient(), lambda_=1.0)
    stream(model, cache, parts)
    assert not cache.layers[0].margin.gates.requires_grad and cache.layers[1].margin.gates.requires_grad
    assert not any(layer.attention_scores.requires_grad for layer in cache.layers)


def test_identical_frames_give_finite_gradients(model):
    """Identical neighbours: 1 − s is nothing but rounding, inside a logarithm."""
    parts = streams(1)
    still = [replace(part, embeds=part.embeds[:, :1].expand(-1, len(part), -1)) for part in parts]
    for attention in (False, True):
        gradient = SelectionGradient(through_attention=attention)
        assert all(one.isfinite().all() for one in weight_gradients(model, new_cache(gradient, lambda_=1.0), still))


# ---- the margin ------------------------------------------------------------------------------------------------------


def evicted(cache, layer: int, sample: int, candidates) -> list[int]:
    """Columns of media tokens among the candidates that a compression did not keep."""
    stays = set(kept(cache, layer, sample))
    return [
        column
        for column in range(len(candidates.metadata))
        if bool(candidates.metadata.valid[sample, column])
        and int(candidates.metadata.modality[sample, column]) != TEXT
        and int(candidates.metadata.index[sample, column]) not in stays
    ]


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("limit", [1, 3, None])
def test_the_margin_holds_the_evicted_tokens_nearest_to_being_retained(model, samples, threshold, limit):
    gradient = SelectionGradient(temperature=0.4, margin=limit, threshold=threshold)
    cache = new_cache(gradient, lambda_=1.0)
    parts = streams(samples)
    run(model, cache, parts[0], text=True)
    seen = 0
    for part in parts[1:]:
        run(model, cache, part)
        for layer in cache.layers:
            layer.pad_scores()
        before = [layer.candidates() for layer in cache.layers]
        keys = [layer.keys.detach().clone() for layer in cache.layers]
        values = [layer.values.detach().clone() for layer in cache.layers]
        scores = [cache.method.score(one).detach() for one in before]
        cache.compress()
        for number, layer in enumerate(cache.layers):
            gone = [evicted(cache, number, sample, before[number]) for sample in range(samples)]
            if not any(gone):
                assert layer.margin is None
                continue
            margin = layer.margin
            assert (
                margin.gradient_scale == gradient.gradient_scale
                and not margin.keys.requires_grad
                and not margin.values.requires_grad
            )
            most = max(map(len, gone))
            assert margin.gates.shape[1] == (most if limit is None else min(limit, most))
            for sample in range(samples):
                gate = gates_by_hand(before[number].metadata, scores[number], layer.budget, sample, gradient)
                nearest = sorted(gone[sample], key=lambda column, gate=gate: -gate[column])[:limit]
                held_gates = margin.gates[sample].detach()
                real = (held_gates > 0).nonzero()[:, 0]
                expected = sorted(nearest)
                assert len(real) == len(expected)
                assert torch.equal(margin.keys[sample][:, real], keys[number][sample][:, expected])
                assert torch.equal(margin.values[sample][:, real], values[number][sample][:, expected])
                by_hand = torch.tensor([gate[column] for column in expected], dtype=torch.float64)
                assert torch.allclose(held_gates[real], by_hand, rtol=0, atol=1e-9)
                seen += len(expected)
    assert seen >= 9


def gates_by_hand(table, score: Tensor, budget, sample: int, gradient: SelectionGradient) -> dict[int, float]:
    """Gate of every media column of a sample, each modality by itself."""
    gate = {}
    for name, kind in EVICTABLE.items():
        places = [
            column
            for column in range(len(table))
            if bool(table.valid[sample, column]) and int(table.modality[sample, column]) == kind
        ]
        x = [float(score[sample, column]) for column in places]
        count = getattr(budget, name)
        tau = by_hand_threshold(x, count, gradient.temperature, gradient.threshold)
        for column, one in zip(places, x, strict=True):
            over_budget = len(places) > count
            gate[column] = 1 / (1 + math.exp(-(one - tau) / gradient.temperature)) if over_budget else 1.0
    return gate


def test_the_margin_is_held_for_one_chunk_only(model):
    cache = new_cache(budgets=profile((4, 3), (4, 3), (4, 3)))
    parts = stream_parts([(6, 5), (5, 4), (0, 0), (1, 0)])
    stream(model, cache, parts[:2])
    first = [layer.margin for layer in cache.layers]
    stream_indices = [set(range(3, 14)) - set(kept(cache, layer)) for layer in range(3)]
    assert all(margin.gates.shape[1] == len(gone) == 4 for margin, gone in zip(first, stream_indices, strict=True))
    run(model, cache, parts[2])
    cache.compress()
    assert all(layer.margin.gates.shape[1] == 9 for layer in cache.layers), "what the second chunk pushed out, no more"
    # A step that pushes nothing out leaves nothing to look at.
    quiet = text_part(2, int(parts[2].next_position_id[0]))
    run(model, cache, quiet)
    cache.compress()
    assert all(layer.margin is None for layer in cache.layers)


def test_a_sample_that_loses_nothing_has_no_gates(model):
    rows = [stream_parts([(6, 5), (5, 4)]), stream_parts([(1, 1)], prefix=5, seed=1)]
    rows[1].append(idle_part(int(rows[1][-1].next_position_id[0])))
    cache = new_cache()
    stream(model, cache, batch_parts(*rows))
    for layer in cache.layers[1:]:
        assert (layer.margin.gates[0] > 0).any() and (layer.margin.gates[1] == 0).all()
        (slope,) = torch.autograd.grad(
            layer.margin.gates[1].sum(), layer.features, retain_graph=True, allow_unused=True
        )
        assert slope is None or (slope == 0).all()


def test_the_states_of_the_margin_are_cut_from_their_graph(model):
    """Evicted keys and values of the last layer get no gradient at all; what their scores were made of does."""
    cache = new_cache(SelectionGradient(gradient_scale=100.0))
    parts = streams(1)
    run(model, cache, parts[0], text=True)
    run(model, cache, parts[1])
    last = cache.layers[-1]
    watched_states = [last.keys, last.values, last.features]
    for state in watched_states:
        state.retain_grad()
    cache.compress()
    gone = sorted(set(range(3 + len(parts[1]))) - set(kept(cache, 2)))
    assert gone and last.margin is not None
    early = answer_loss(answer(model, cache))
    run(model, cache, parts[2])
    cache.compress()
    (early + answer_loss(answer(model, cache))).backward()
    keys, values, features = (state.grad for state in watched_states)
    assert (keys[0][:, gone] == 0).all() and (values[0][:, gone] == 0).all()
    assert keys.abs().max() > 0 and values.abs().max() > 0
    assert (features[0, gone].abs().amax(-1) > 0).any()
    model.zero_grad()


# ---- what it cannot do -----------------------------------------------------------------------------------------------

REFUSED = [(name, {}) for name in SELECTION_METHODS if name not in ("omnimem", "similarity_only", "learned")]
REFUSED += [("omnimem", {"position_ids": "compact"}), ("similarity_only", {"position_ids": "compact"})]


@pytest.mark.parametrize(("method", "options"), REFUSED)
def test_a_selection_that_no_gradient_can_reach_is_refused(method, options):
    with pytest.raises(OmniMemError) as refusal:
        new_cache(EVERY, method, **options)
    message = str(refusal.value)
    assert "\n" not in message and type(build_selection(method)).__name__ in message
    assert "selection.gradient=none" in message
    new_cache(None, method, **options)


@pytest.mark.parametrize("options", [{"variant": "release"}, {"lambda": 0.0}], ids=str)
def test_a_gradient_through_a_attention_scores_that_has_none_is_refused(options):
    with pytest.raises(OmniMemError, match=r"needs selection\.lambda above 0 and selection\.attention_scores=heads"):
        new_cache(SelectionGradient(through_attention=True), **options)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"margin": 0}, "margin must be at least 1"),
        ({"gradient_scale": -1.0}, "gradient_scale must be at least 0"),
        ({"threshold": "bisect"}, "threshold must be boundary or bisection"),
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_refused(wrong, rule):
    with pytest.raises(OmniMemError, match=f"selection gradient: {rule}"):
        SelectionGradient(**wrong)


def test_equal_neighbours_do_not_blow_up_the_gradient():
    """Where two neighbours differ by ε, 1 − s is ε²/2, and the gradient of its logarithm would be 2/ε."""
    method = build_selection("omnimem", lambda_=0.0)
    table = TokenMetadata(
        index=torch.arange(3)[None],
        position_ids=torch.zeros(1, 3, 3, dtype=torch.int64),
        time=torch.zeros(1, 3),
        modality=torch.ones(1, 3, dtype=torch.int8),
        valid=torch.ones(1, 3, dtype=torch.bool),
    )
    slopes = []
    for size in (1e-1, 1e-3, 1e-6, 0.0):
        features = torch.ones(1, 3, 8, dtype=torch.float64)
        features[0, 1, 0] += size
        features.requires_grad_()
        candidates = Candidates(
            layer=0, num_layers=1, budget=LayerBudget(1, 1), num_previous=0, values=torch.zeros(1, 1, 3, 1), keys=None,
            metadata=table,
            attention_scores=None, probe_scores=(), features=features,
        )  # fmt: skip
        score = method.score(candidates)
        # The value is that of inference.
        assert torch.equal(score, method.score(replace(candidates, features=features.detach())))
        (slope,) = torch.autograd.grad(score[0, 1], features)
        slopes.append(slope.norm().item())
    assert all(math.isfinite(slope) for slope in slopes) and max(slopes) < 60

"""The soft form of the selection's gradient: the next best stay as well, and gates weigh everything in attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from omnimem.errors import OmniMemError
from omnimem.forward import Stream
from omnimem.memory import CompressedCache, SelectionGradient
from omnimem.memory.selection_gradient import soft_attention_inputs
from omnimem.modality import EVICTABLE, TEXT
from omnimem.selection import build_selection
from omnimem.selection.gates import gates
from oracles import offline, run, slopes_of, stream
from small_decoder import BUDGETS, answer, answer_loss, lora_weights, model, streams  # noqa: F401
from small_runs import adapter, arguments, main, metrics, trained_run


def soft_cache(gradient: SelectionGradient | None = None, **options: Any) -> CompressedCache:
    return CompressedCache(BUDGETS, build_selection("omnimem", **options), gradient or SelectionGradient("soft"))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("margin", [1, 3, None])
def test_the_cache_holds_the_budget_and_the_margin_and_no_more(model, samples, margin):
    cache, parts = soft_cache(SelectionGradient("soft", margin=margin)), streams(samples)
    for number, part in enumerate(parts):
        run(model, cache, part, text=number == 0)
        cache.compress()
        slots = len(part) if margin is None else margin
        for layer, counted in zip(cache.layers, cache.token_counts(), strict=True):
            for row in range(samples):
                held = counted["visual"][row] + counted["audio"][row]
                assert held <= layer.budget.total + (slots if number else len(part))
                found = layer.metadata.modality[row][layer.metadata.valid[row]]
                assert {k: int((found == kind).sum()) for k, kind in EVICTABLE.items()} == {
                    k: counted[k][row] for k in EVICTABLE
                }
    assert any(sum(layer.token_counts[0][k] for k in EVICTABLE) > layer.budget.total for layer in cache.layers)


def test_biases_are_the_logarithms_of_the_gates_summed_over_the_chunks(model):
    """Followed by hand, token by token, from the scores the method gives."""
    gradient = SelectionGradient("soft", temperature=0.5, margin=4)
    cache, parts = soft_cache(gradient), streams(1)
    known: list[dict[int, float]] = [{} for _ in cache.layers]
    for number, part in enumerate(parts):
        run(model, cache, part, text=number == 0)
        for i, layer in enumerate(cache.layers):
            layer.pad_scores()
            if not layer.over_budget:
                continue
            candidates = layer.candidates()
            score, table = cache.method.score(candidates), layer.metadata
            for name, kind in EVICTABLE.items():
                competing = (table.modality == kind) & table.valid
                gate = gates(score, competing, getattr(layer.budget, name), 0.5)[0]
                for column in competing[0].nonzero()[:, 0].tolist():
                    index = int(table.index[0, column])
                    known[i][index] = known[i].get(index, 0.0) + gate[column].log().item()
        cache.compress()
        for i, layer in enumerate(cache.layers):
            for column, index in enumerate(layer.metadata.index[0].tolist()):
                expected = 0.0 if layer.metadata.modality[0, column] == TEXT else known[i].get(index, 0.0)
                found = 0.0 if layer.state.bias is None else layer.state.bias[0, column].item()
                assert found == pytest.approx(expected, abs=1e-9)
    assert all(layer.state.bias is not None and layer.state.bias.min() < -0.1 for layer in cache.layers)


@pytest.mark.parametrize("scale", [0.2, 1.0])
def test_a_biased_product_is_the_product_and_the_bias(model, scale):
    cache = soft_cache()
    stream(model, cache, streams(1))
    layer: Any = cache.layers[1]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 5, 8, generator=generator, dtype=torch.float64)
    wide_query, wide_key = soft_attention_inputs(layer.state, query, layer.keys, scale)
    assert wide_query.shape[-1] == wide_key.shape[-1] == 16
    for head in range(4):
        expected = scale * query[0, head] @ layer.keys[0, head // 2].T + layer.state.bias[0]
        found = scale * wide_query[0, head] @ wide_key[0, head // 2].T
        assert (found - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("attention", [False, True])
def test_the_gradient_of_the_whole_path_equals_finite_differences(model, samples, attention):
    """With the threshold that makes gates sum to the budget; the boundary borrows its gradient."""
    gradient = SelectionGradient(
        "soft", 1.0, margin=3, gradient_scale=1.0, threshold="bisection", through_attention=attention
    )
    parts, weights = streams(samples), lora_weights(model)
    options = {"lambda": 1.0 if attention else 0.02}
    if not attention:
        options = {"lambda": 0.0}  # else the forward moves with a attention scores that no gradient goes through
    decisions: list[Any] = []

    def loss(replay: bool) -> Tensor:
        cache = soft_cache(gradient, **options)
        flow = Stream(offline(model), cache)
        flow.forward(parts[0], text=True)
        total = torch.zeros((), dtype=torch.float64)
        for number, part in enumerate(parts[1:], start=1):
            flow.forward(part)
            if replay:
                cache.compress(decisions[number - 1])
            else:
                decisions.append(cache.compress())
            if number in (2, 4):
                total = total + answer_loss(answer(model, cache, seed=50 + number))
        return total

    slopes = torch.autograd.grad(loss(replay=False), weights)
    generator = torch.Generator().manual_seed(1)
    with slopes_of(weights, lambda: loss(replay=True).item()) as slope:
        for _ in range(2):
            direction = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
            expected = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True)).item()
            assert slope(direction, 1e-5) == pytest.approx(expected, rel=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 2])
def test_the_soft_form_at_temperature_zero_is_the_hard_one(model, samples):
    """After one eviction; at the next, the margin stands between tokens and makes other neighbours of them."""
    parts, losses = streams(samples), []
    for gradient in (SelectionGradient("soft", temperature=1e-6, margin=3), None, SelectionGradient("soft")):
        cache = CompressedCache(BUDGETS, build_selection("omnimem", lambda_=0.0), gradient)
        flow = Stream(offline(model), cache)
        flow.forward(parts[0], text=True)
        flow.step(parts[1])
        losses.append(answer_loss(answer(model, cache)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert abs(losses[2] - losses[1]) > 1e-3, "a warm one is not"


@pytest.mark.long
def test_a_soft_run_trains_resumes_and_is_evaluated_hard(tmp_path):
    options = ("selection.gradient=soft", "gate.temperature=1.0", "gate.temperature_end=0.03", "gate.margin=8")
    hard = trained_run(tmp_path, "train.max_steps=1", out="hard")
    run_ = trained_run(tmp_path, *options, out="soft")
    first = metrics(run_)[0]
    assert first["loss"] != metrics(hard)[0]["loss"], "the forward pass is another one"
    assert any(record["retained"]["visual"] > 20 for record in metrics(run_))
    held_out = f"eval.path={tmp_path / 'data.jsonl'}", f"eval.root={arguments(tmp_path)[2].split('=')[1]}"
    evaluated = trained_run(
        tmp_path, *options, *held_out, "train.learning_rate=0.0", "train.max_steps=1", out="evaluated"
    )
    plain = trained_run(tmp_path, *held_out, "train.learning_rate=0.0", "train.max_steps=1", out="plain")
    assert metrics(evaluated)[0]["eval_loss"] == metrics(plain)[0]["eval_loss"]
    assert all(value.isfinite().all() for value in adapter(run_).values())


def test_an_unknown_form_is_one_line(tmp_path, capsys):
    with pytest.raises(OmniMemError, match="form must be straight_through or soft"):
        SelectionGradient("hard")  # pyright: ignore[reportArgumentType]
    assert main(arguments(tmp_path, "selection.gradient=softer")) == 2
    assert "selection.gradient" in capsys.readouterr().err

"""The gradient of a compressed stream is exact: through every retained state, back to the first chunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omnimem.backbones import ChunkInputs
from omnimem.memory import CompressedCache
from omnimem.selection import build_selection
from oracles import (
    idle_part,
    kept,
    profile,
    run,
    slopes_of,
    stream,
    stream_parts,
    text_part,
)
from small_decoder import Replay, head, lora_decoder, lora_weights

BUDGETS = profile((3, 2), (2, 4), (5, 1))
AMPLE = profile((200, 200), (200, 200), (200, 200))
SIZES = [(5, 3), (6, 2), (4, 4), (7, 1)]
TARGETS = torch.randint(0, 11, (6,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model():
    return lora_decoder("q_proj", "k_proj", "v_proj")


def answer_loss(model, cache, parts: list[ChunkInputs]) -> Tensor:
    """Cross-entropy of an answer read after the stream, inside `scratch` as in training."""
    stream(model, cache, parts)
    return question_loss(model, cache, parts)


def question_loss(model, cache, parts) -> Tensor:
    starts = parts[-1].next_position_id.tolist()
    question = ChunkInputs.batch([text_part(6, start, seed=50 + i) for i, start in enumerate(starts)])
    with cache.scratch():
        hidden = run(model, cache, question, text=True)
    return sum(F.cross_entropy(row @ head().T, TARGETS) for row in hidden)


def new_cache(budgets=BUDGETS, method="omnimem", **options) -> CompressedCache:
    return CompressedCache(budgets, build_selection(method, **options))


def batch_of_two() -> list[ChunkInputs]:
    rows = [stream_parts(SIZES), stream_parts(SIZES[1:3], prefix=5, seed=1)]
    rows[1] += [idle_part(int(rows[1][-1].next_position_id[0]))] * (len(rows[0]) - len(rows[1]))
    return [ChunkInputs.batch(list(step)) for step in zip(*rows, strict=True)]


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("method", ["omnimem", "uniform"])
def test_gradients_of_a_compressed_stream_equal_finite_differences(model, monkeypatch, samples, method):
    parts = stream_parts(SIZES) if samples == 1 else batch_of_two()
    replay = Replay(monkeypatch)
    weights = lora_weights(model)
    cache = new_cache(method=method)
    loss = answer_loss(model, cache, parts)
    assert len(replay.recorded) >= 9, "selection must have evicted in every layer for several chunks"
    gradients = torch.autograd.grad(loss, weights)
    generator = torch.Generator().manual_seed(1)

    def replayed() -> float:
        replay.rewind()
        return answer_loss(model, new_cache(method=method), parts).item()

    with slopes_of(weights, replayed) as slope:
        for only in (None, 0, 1, 2):
            # All weights together, then those of one layer at a time.
            direction = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
            if only is not None:
                names = [name for name, _ in model.named_parameters() if "lora_" in name]
                direction = [d * (f"layers.{only}." in n) for d, n in zip(direction, names, strict=True)]
            expected = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
            assert expected != 0
            assert abs(slope(direction, 1e-4) - expected) <= 1e-6 * abs(expected)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("method", ["omnimem", "full"])
def test_without_eviction_gradients_equal_those_of_one_full_forward(model, method, samples):
    parts = stream_parts(SIZES) if samples == 1 else batch_of_two()
    weights = lora_weights(model)
    streamed = torch.autograd.grad(answer_loss(model, new_cache(AMPLE, method=method), parts), weights)
    whole = [torch.zeros_like(weight) for weight in weights]
    singles = (
        [stream_parts(SIZES)] if samples == 1 else [stream_parts(SIZES), stream_parts(SIZES[1:3], prefix=5, seed=1)]
    )
    for sample, rows in enumerate(singles):
        # The path of transformers: no cache at all, one causal forward over stream and question.
        question = text_part(6, int(rows[-1].next_position_id[0]), seed=50 + sample)
        everything = [*rows, question]
        hidden = model(
            inputs_embeds=torch.cat([part.embeds for part in everything], 1),
            position_ids=torch.cat([part.position_ids for part in everything], 2),
            use_cache=False,
        ).last_hidden_state
        loss = F.cross_entropy(hidden[0, -6:] @ head().T, TARGETS)
        whole = [total + g for total, g in zip(whole, torch.autograd.grad(loss, weights), strict=True)]
    for ours, expected in zip(streamed, whole, strict=True):
        assert expected.abs().max() > 0
        assert (ours - expected).abs().max() <= 1e-10


def test_gradients_reach_the_first_chunks_states_after_eviction(model):
    parts = stream_parts(SIZES)
    cache = new_cache()
    run(model, cache, parts[0], text=True)
    run(model, cache, parts[1])
    first = [(layer.keys, layer.values) for layer in cache.layers]
    for states in first:
        for state in states:
            state.retain_grad()
    cache.compress()
    after_first = [kept(cache, layer) for layer in range(3)]
    for part in parts[2:]:
        run(model, cache, part)
        cache.compress()
    question_loss(model, cache, parts).backward()
    for layer, (keys, values) in enumerate(first):
        survivors = [index for index in kept(cache, layer) if index < 3 + len(parts[1])]
        assert any(index >= 3 for index in survivors), "something of the first chunk is still there"
        evicted_at_once = sorted(set(range(3 + len(parts[1]))) - set(after_first[layer]))
        assert evicted_at_once
        for grad in (keys.grad, values.grad):
            reached = grad[0].abs().amax((0, 2))
            assert (reached[survivors] > 0).all()
            # In the last layer only later queries could still need it, and they never saw it.
            assert (reached[evicted_at_once] == 0).all() or layer < 2
    model.zero_grad()


def test_gradients_reach_the_first_chunks_inputs(model):
    parts = stream_parts(SIZES)
    parts[1].embeds.requires_grad_()
    answer_loss(model, new_cache(), parts).backward()
    assert (parts[1].embeds.grad.abs().amax(-1) > 0).any()
    assert parts[1].embeds.grad.isfinite().all()
    model.zero_grad()


def test_later_chunks_do_not_overwrite_what_an_earlier_loss_needs(model):
    """A loss of a question asked early is differentiated after the stream went on, and nothing has changed."""
    parts = stream_parts(SIZES)
    weights = lora_weights(model)
    cache = new_cache()
    stream(model, cache, parts[:3])
    early = question_loss(model, cache, parts[:3])
    expected = torch.autograd.grad(early, weights, retain_graph=True)
    for part in parts[3:]:
        run(model, cache, part)
        cache.compress()
    with torch.no_grad(), cache.scratch():
        run(model, cache, text_part(40, 500), text=True)
    for ours, theirs in zip(torch.autograd.grad(early, weights), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_padding_of_a_batch_gets_no_gradient_and_gives_none(model):
    steps = batch_of_two()
    for step in steps:
        step.embeds.requires_grad_()
    answer_loss(model, new_cache(), steps).backward()
    padded = 0
    for step in steps:
        if step.valid is not None and not step.valid.all():
            padded += 1
            assert (step.embeds.grad[~step.valid] == 0).all()
        assert step.embeds.grad.isfinite().all()
    assert padded >= 3
    model.zero_grad()


def test_selection_takes_no_part_in_the_graph(model):
    cache = new_cache()
    stream(model, cache, stream_parts(SIZES))
    for layer in cache.layers:
        assert layer.keys.requires_grad and layer.values.requires_grad
        assert not layer.attention_scores.requires_grad and not layer.features.requires_grad

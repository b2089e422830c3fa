"""A probe tells how it attends to what is stored, at the depth it was asked, and is then as if it had never been."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from omnimem.backbones import ChunkInputs
from omnimem.budget import BudgetProfile
from omnimem.forward import Stream
from omnimem.memory import CompressedCache, attach
from omnimem.memory.scores import probe_attention
from omnimem.selection import Candidates, Probe, SelectionMethod, build_selection
from oracles import (
    batch_parts,
    held,
    offline,
    probe_embeds,
    profile,
    run,
    same,
    step,
    stream,
    stream_parts,
    text_model,
    text_part,
)

BUDGETS = profile((6, 3), (2, 9), (8, 1))
SIZES = [(5, 2), (8, 4), (3, 0), (0, 6), (9, 3)]
OTHER_SIZES = [(2, 6), (4, 4), (9, 1)]
PROBING = pytest.mark.parametrize("method", ["streammem", "hermes", "hermes_released"])
GRAD = pytest.mark.parametrize("grad", [False, True], ids=["in-place", "functional"])
REACHES = ("causal", "all", "memory")


@pytest.fixture(scope="module")
def model():
    model = text_model()
    attach(model)
    return model


class Asking(SelectionMethod):
    """Keeps the most recent tokens and writes down what its probes were told."""

    def __init__(self, *probes: Probe) -> None:
        self.probes = probes
        self.told: dict[int, list[tuple[Tensor, ...]]] = {}

    def score(self, candidates: Candidates) -> Tensor:
        self.told.setdefault(candidates.layer, []).append(candidates.probe_scores)
        return candidates.metadata.index.double()


def memory(method: SelectionMethod, budgets: BudgetProfile = BUDGETS) -> Any:
    return CompressedCache(budgets, method)


def streams(samples: int) -> list[ChunkInputs]:
    rows = [stream_parts(SIZES), stream_parts(OTHER_SIZES, prefix=5, seed=1)]
    return rows[0] if samples == 1 else batch_parts(*rows)


# ---- the function ----------------------------------------------------------------------------------------------------


def probe_states(heads: int, groups: int, stored: int, probe: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(stored)
    shapes = ((3, heads, probe, 8), (3, groups, stored + probe, 8))
    query, key = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return query, key


def attention_to_stored(query: Tensor, key: Tensor, valid: Tensor | None, scaling: float, attends: str) -> Tensor:
    """One softmax at a time over the columns a query of the probe may look at; their mean."""
    batch, heads, probe, _ = query.shape
    stored = key.shape[2] - probe
    result = torch.zeros(batch, stored, dtype=torch.float64)
    for sample in range(batch):
        for head in range(heads):
            keys = key[sample, head * key.shape[1] // heads].double()
            for row in range(probe):
                reach = {"causal": stored + row + 1, "all": stored + probe, "memory": stored}[attends]
                seen = [k for k in range(reach) if valid is None or valid[sample, k]]
                weights = (keys[seen] @ query[sample, head, row].double() * scaling).softmax(0)
                for weight, column in zip(weights, seen, strict=True):
                    if column < stored:
                        result[sample, column] += weight / (heads * probe)
    return result


@pytest.mark.parametrize("attends", REACHES)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_what_a_probe_reaches(attends, heads, groups, padded, dtype):
    query, key = probe_states(heads, groups, 11, 4, dtype)
    valid = None
    if padded:
        valid = torch.ones(3, 15, dtype=torch.bool)
        valid[1, 3:6] = valid[2, 1:11] = False
    found = probe_attention(query, key, valid, 0.3, attends)
    expected = attention_to_stored(query, key, valid, 0.3, attends)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found - expected).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5)
    assert valid is None or (found[~valid[:, :11]] == 0).all()


def test_a_probe_over_stored_tokens_alone_has_all_its_attention_there():
    query, key = probe_states(4, 2, 11, 4)
    total = {attends: probe_attention(query, key, None, None, attends).sum(1) for attends in REACHES}
    assert (total["memory"] - 1).abs().max() <= 1e-12
    assert (total["all"] < total["causal"]).all() and (total["causal"] < 1).all()


# ---- in the model ----------------------------------------------------------------------------------------------------


def test_a_probe_measures_what_the_transformers_model_attends_to(model):
    """Against the transformers model in one forward over prefix, chunk and probe, with its own eager attention."""
    probe = Probe("what is here?")
    method = Asking(probe)
    cache = memory(method)
    parts = stream_parts(SIZES)
    with torch.no_grad():
        stream(model, cache, parts[:2])
        embeds = probe_embeds(0, 1)
        question = ChunkInputs.text(embeds, parts[1].next_position_id)
        everything = [parts[0], parts[1], question]
        stock = text_model()
        stock.set_attn_implementation("eager")
        attentions = stock(
            inputs_embeds=torch.cat([part.embeds for part in everything], 1),
            position_ids=torch.cat([part.position_ids for part in everything], 2),
            output_attentions=True,
        ).attentions
    stored = len(parts[0]) + len(parts[1])
    for layer, weights in enumerate(attentions):
        (((told),),) = method.told[layer]
        assert (told - weights[:, :, stored:, :stored].mean((1, 2))).abs().max() <= 1e-6  # eager rounds to float32


class Inputs:
    """What each attention module of a model projects, call by call."""

    def __init__(self, model):
        self.seen: list[list[Tensor]] = [[] for _ in model.layers]
        self.handles = [
            layer.self_attn.q_proj.register_forward_pre_hook(self.record(number))
            for number, layer in enumerate(model.layers)
        ]

    def record(self, number: int):
        return lambda _module, args: self.seen[number].append(args[0].clone())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def test_every_layer_is_shown_the_embeddings_of_a_probe_that_does_not_propagate(model):
    embeds = probe_embeds(0, 1)
    for propagates in (False, True):
        cache = memory(build_selection("omnimem"))
        with torch.no_grad():
            stream(model, cache, stream_parts(SIZES))
            with cache.probing(Probe("", propagates=propagates), embeds), Inputs(model) as inputs:
                run(model, cache, ChunkInputs.text(embeds, cache.next_position_id), text=True)
            for number, layer in enumerate(model.layers):
                (shown,) = inputs.seen[number]
                assert torch.equal(shown, layer.input_layernorm(embeds)) == (number == 0 or not propagates)
            # Afterwards layers see what the model computes again.
            with Inputs(model) as inputs:
                run(model, cache, text_part(2, 99), text=True)
            assert not torch.equal(inputs.seen[2][0], model.layers[2].input_layernorm(text_part(2, 99).embeds))


# ---- no trace --------------------------------------------------------------------------------------------------------


@GRAD
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("length", [3, 300], ids=["short", "buffer-grows"])
@pytest.mark.parametrize("method", ["omnimem", "h2o", "streaming_llm", "streammem", "hermes", "hermes_released"])
def test_a_probe_leaves_no_trace(model, method, grad, samples, length):
    """Between a chunk and its compression, where probes are asked, and after it."""
    cache = memory(build_selection(method))
    parts = streams(samples)
    embeds = text_part(length, 0, seed=3).embeds.expand(samples, -1, -1)
    probes = [Probe("", softmax_over=reach, propagates=propagates) for reach in REACHES for propagates in (True, False)]
    with torch.set_grad_enabled(grad):
        stream(model, cache, parts[:4])
        before, room = held(cache), []
        for probe in probes:
            with torch.no_grad(), cache.probing(probe, embeds):
                run(model, cache, ChunkInputs.text(embeds, cache.next_position_id), text=True)
                assert cache.lengths()[0] > before[-1][1]
            assert same(before, held(cache))
            room.append(cache.nbytes)
        # Room for a probe is made in the buffers once, and stays.
        assert len(set(room)) == 1
        for layer in cache.layers:
            assert [tuple(one.shape) for one in layer._probe_scores] == [(samples, len(layer.metadata))] * len(probes)


@GRAD
@pytest.mark.parametrize("samples", [1, 2])
def test_a_stream_that_is_probed_is_the_stream_that_is_not(model, grad, samples):
    probed = Asking(Probe(""), Probe("", softmax_over="all", propagates=False), Probe("", softmax_over="memory"))
    silent = Asking()
    outputs, memories = [], []
    for method in (probed, silent):
        cache = memory(method)
        with torch.set_grad_enabled(grad):
            outputs.append(stream(model, cache, streams(samples)))
        memories.append(held(cache))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert same(*memories)
    for layer in probed.told.values():
        assert all(len(told) == 3 and not any(one.requires_grad for one in told) for told in layer)


def test_a_probe_that_fails_leaves_no_trace(model):
    cache = memory(build_selection("hermes_released"))
    embeds = probe_embeds(0, 1)
    with torch.no_grad():
        stream(model, cache, stream_parts(SIZES))
        before = held(cache)
        with pytest.raises(ZeroDivisionError), cache.probing(Probe("", propagates=False), embeds):
            run(model, cache, ChunkInputs.text(embeds, cache.next_position_id), text=True)
            raise ZeroDivisionError
        assert same(before, held(cache))
        with Inputs(model) as inputs:
            run(model, cache, text_part(3, 99), text=True)
        assert torch.equal(inputs.seen[0][0], model.layers[0].input_layernorm(text_part(3, 99).embeds))


@PROBING
def test_probed_attention_is_of_use_once(model, method):
    """What a probe told before one compression is not held against the next."""
    cache = memory(build_selection(method))
    with torch.no_grad():
        stream(model, cache, stream_parts(SIZES))
    assert [layer._probe_scores for layer in cache.layers] == [[]] * 3


# ---- the stream asks -------------------------------------------------------------------------------------------------


class Calls:
    """Embeddings and rotary ids of every forward of the decoder."""

    def __init__(self, model):
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.handle = model.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, _model, _args, kwargs):
        self.seen.append((kwargs["inputs_embeds"], kwargs["position_ids"]))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_stream_runs_every_probe_after_every_chunk(model, samples, positions):
    method = Asking(Probe("where?"), Probe("and now?", as_user_turn=True, softmax_over="all"))
    method.position_ids = positions
    cache = memory(method)
    backbone = offline(model)
    flow = Stream(backbone, cache)
    parts = streams(samples)
    texts = (backbone.text_ids("where?"), backbone.question_ids("and now?"))
    with torch.no_grad():
        flow.forward(parts[0], text=True)
        for part in parts[1:]:
            with Calls(model) as calls:
                flow.step(part)
            chunk, *asked = calls.seen
            assert torch.equal(chunk[0], part.embeds) and len(asked) == 2
            # Behind the chunk: text ids go on where the text that follows it would stand.
            after = part.next_position_id + chunk[1][0, :, 0] - part.position_ids[0, :, 0]
            if part.valid is not None:
                continue_at = [after[i] if part.valid[i, 0] else None for i in range(samples)]
            else:
                continue_at = list(after)
            for (embeds, ids), text in zip(asked, texts, strict=True):
                assert torch.equal(embeds, backbone.embed(text).expand(samples, -1, -1))
                for sample, start in enumerate(continue_at):
                    if start is not None:
                        assert ids[:, sample].tolist() == [list(range(int(start), int(start) + text.shape[1]))] * 3
    assert all(len(told) == len(parts) - 1 for told in method.told.values())


@PROBING
@pytest.mark.parametrize("sizes", [SIZES, [(5, 2), (8, 4), (7, 1)], [(5, 0), (9, 0), (7, 0)], [(0, 5), (0, 9)]])
def test_a_single_stream_holds_no_padding_and_is_never_masked(model, method, sizes):
    """Also where one modality has been merged and the other has not, or is not there at all."""
    budgets = profile((6, 30), (6, 30), (6, 4))
    cache = memory(build_selection(method), budgets)
    parts = stream_parts(sizes)
    with torch.no_grad():
        run(model, cache, parts[0], text=True)
        for number, part in enumerate(parts[1:], start=1):
            step(model, cache, part)
            assert all(layer.step.valid is None and bool(layer.metadata.valid.all()) for layer in cache.layers)
            seen = [sum(size[kind] for size in sizes[:number]) for kind in (0, 1)]
            for length, budget in zip(cache.lengths(), budgets.layers, strict=True):
                assert length == 3 + min(seen[0], budget.visual) + min(seen[1], budget.audio)


@PROBING
@GRAD
def test_streams_side_by_side_equal_each_alone_where_one_modality_is_scarce(model, method, grad):
    budgets = profile((6, 30), (6, 30), (6, 4))
    rows = [stream_parts([(5, 2), (8, 4), (7, 1)]), stream_parts([(2, 6), (4, 14)], prefix=5, seed=1)]
    with torch.set_grad_enabled(grad):
        together = stream(model, memory(build_selection(method), budgets), batch_parts(*rows))
        for sample, parts in enumerate(rows):
            alone = stream(model, memory(build_selection(method), budgets), parts)
            for ours, expected in zip(together, alone, strict=False):
                assert (ours[sample, : expected.shape[1]] - expected[0]).abs().max() <= 1e-12

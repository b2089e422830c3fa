"""Where every key-value head keeps its own tokens, each holds exactly its budget and is attended to by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clips import WEBB
from omnimem.backbones import ChunkInputs
from omnimem.budget import BudgetProfile
from omnimem.forward import Stream
from omnimem.memory import CompressedCache, attach
from omnimem.modality import AUDIO, TEXT, VISUAL
from omnimem.selection import SELECTION_METHODS, Candidates, SelectionMethod, build_selection
from omnimem.stream import StreamingSession
from omnimem.stream_settings import StreamSettings
from oracles import (
    batch_parts,
    held,
    kept,
    profile,
    run,
    same,
    step,
    stream,
    stream_parts,
    text_model,
    text_part,
)

HEADS, GROUPS, DIM = 4, 2, 8
BUDGETS = profile((6, 3), (2, 9), (25, 1))
SIZES = [(5, 2), (8, 4), (3, 0), (0, 6), (9, 3), (1, 1), (7, 5)]
OTHER_SIZES = [(2, 6), (4, 4), (9, 1)]
ROWS = [
    ("h2o", {}),
    ("snapkv", {"window_size": 3, "kernel_size": 3}),
    ("infinipot_v", {}),
    ("infinipot_v_released", {}),
]
METHODS = pytest.mark.parametrize(("method", "options"), ROWS, ids=[name for name, _ in ROWS])
GRAD = pytest.mark.parametrize("grad", [False, True], ids=["in-place", "functional"])


@pytest.fixture(scope="module")
def model():
    model = text_model()
    attach(model)
    return model


def new_cache(method: str, budgets: BudgetProfile = BUDGETS, **options) -> Any:
    return CompressedCache(budgets, build_selection(method, **options))


class Striped(SelectionMethod):
    """Head g keeps the most recent tokens whose place in the stream leaves the remainder g, then the others."""

    per_head = True

    def score(self, candidates: Candidates) -> Tensor:
        index = candidates.metadata.index
        head = torch.arange(len(index))[:, None] % GROUPS
        return index.double() + 1e6 * (index % GROUPS == head)


def striped() -> Any:
    return CompressedCache(BUDGETS, Striped())


def test_these_methods_retain_tokens_per_head():
    assert {name for name in SELECTION_METHODS if build_selection(name).per_head} == {name for name, _ in ROWS}


# ---- what is stored --------------------------------------------------------------------------------------------------


@METHODS
@GRAD
def test_every_head_holds_text_and_exactly_the_budget_of_each_modality(model, method, options, grad):
    sizes = (SIZES, OTHER_SIZES)
    cache = new_cache(method, **options)
    steps = batch_parts(stream_parts(SIZES), stream_parts(OTHER_SIZES, prefix=5, seed=1))
    seen = [[0, 0], [0, 0]]
    differing = 0
    with torch.set_grad_enabled(grad):
        run(model, cache, steps[0], text=True)
        for number, part in enumerate(steps[1:]):
            step(model, cache, part)
            for sample in (0, 1):
                more = sizes[sample][number] if number < len(sizes[sample]) else (0, 0)
                seen[sample] = [a + b for a, b in zip(seen[sample], more, strict=True)]
            for layer, budget in enumerate(BUDGETS.layers):
                table, states = cache.token_metadata(layer), cache.layers[layer]
                assert table.index.shape[0] == 2 * GROUPS
                assert states.keys.shape == states.values.shape == (2 * GROUPS, 1, len(table), DIM)
                for sample, (visual, audio) in enumerate(seen):
                    visual, audio = min(visual, budget.visual), min(audio, budget.audio)
                    assert {name: count[sample] for name, count in cache.token_counts()[layer].items()} == {
                        "text": (3, 5)[sample], "visual": visual, "audio": audio,
                    }  # fmt: skip
                    for row in range(sample * GROUPS, (sample + 1) * GROUPS):
                        kinds = table.modality[row][table.valid[row]].tolist()
                        assert kinds.count(VISUAL) == visual and kinds.count(AUDIO) == audio
                        assert kinds.count(TEXT) == (3, 5)[sample] == len(kinds) - visual - audio
                    differing += kept(cache, layer, sample * GROUPS) != kept(cache, layer, sample * GROUPS + 1)
    assert differing > 0, "heads that all keep the same test nothing"


@torch.no_grad()
@METHODS
def test_a_rows_facts_are_those_of_what_was_fed_in(model, method, options):
    rows = [stream_parts(SIZES), stream_parts(OTHER_SIZES, prefix=6, seed=2)]
    cache = new_cache(method, **options)
    stream(model, cache, batch_parts(*rows))
    for sample, parts in enumerate(rows):
        positions = torch.cat([part.position_ids[:, 0] for part in parts], dim=1).T
        times = torch.cat([part.time[0] for part in parts]).float()
        kinds = torch.cat([part.modality[0] for part in parts])
        for layer in range(3):
            table = cache.token_metadata(layer)
            for row in range(sample * GROUPS, (sample + 1) * GROUPS):
                index = kept(cache, layer, row)
                assert index == sorted(set(index))
                real = table.valid[row]
                assert torch.equal(table.position_ids[row][real], positions[index])
                assert torch.equal(table.modality[row][real], kinds[index])
                assert torch.equal(table.time[row][real].nan_to_num(-1), times[index].nan_to_num(-1))


def first_layer(model, parts: list[ChunkInputs]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[H, N, D]``, keys and values ``[G, N, D]`` of the first layer, which no eviction changes."""
    layer = model.layers[0]
    normed = layer.input_layernorm(torch.cat([part.embeds for part in parts], 1))
    cos, sin = model.rotary_emb(normed, torch.cat([part.position_ids for part in parts], 2))

    def turned(states: Tensor) -> Tensor:
        half = torch.cat((-states[..., DIM // 2 :], states[..., : DIM // 2]), -1)
        return states * cos[0] + half * sin[0]

    projections = (getattr(layer.self_attn, name)(normed)[0] for name in ("q_proj", "k_proj", "v_proj"))
    query, key, value = (states.unflatten(-1, (-1, DIM)).transpose(0, 1) for states in projections)
    return turned(query), turned(key), value


@torch.no_grad()
def test_every_head_holds_its_own_states_and_its_queries_see_them_alone(model):
    """Attention of the last chunk in the first layer, head by head, over what its key-value head kept."""
    cache, parts = striped(), stream_parts(SIZES)
    stream(model, cache, parts[:-1])
    query, key, value = first_layer(model, parts)
    for row in range(GROUPS):
        assert all(index % GROUPS == row for index in kept(cache, 0, row)[3:])
        for states, everything in ((cache.layers[0].keys, key), (cache.layers[0].values, value)):
            assert (states[row, 0] - everything[row, kept(cache, 0, row)]).abs().max() <= 1e-12
    memory = [kept(cache, 0, row) for row in range(GROUPS)]
    assert set(memory[0][3:]).isdisjoint(memory[1][3:])
    outputs: list[Tensor] = []
    handle = model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _module, args: outputs.append(args[0]))
    run(model, cache, parts[-1])
    handle.remove()
    found = outputs[0][0].unflatten(-1, (HEADS, DIM))
    before = sum(len(part) for part in parts[:-1])
    for head in range(HEADS):
        group = head * GROUPS // HEADS
        for row in range(len(parts[-1])):
            seen = [*memory[group], *range(before, before + row + 1)]
            weights = (key[group, seen] @ query[head, before + row] / DIM**0.5).softmax(0)
            assert (found[row, head] - weights @ value[group, seen]).abs().max() <= 1e-12


@torch.no_grad()
def test_the_attention_scores_of_a_head_is_what_its_own_queries_gave(model):
    """H2O's attention scores in the first layer, summed chunk by chunk from the states themselves."""
    cache, parts = new_cache("h2o"), stream_parts(SIZES)
    run(model, cache, parts[0], text=True)
    query, key, _ = first_layer(model, parts)
    mass = [dict.fromkeys(range(3), 0.0) for _ in range(GROUPS)]
    start = 3
    for part in parts[1:]:
        for group in range(GROUPS):
            stored = kept(cache, 0, group)
            for place in range(start, start + len(part)):
                seen = [*stored, *range(start, place + 1)]
                for head in range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS):
                    weights = (key[group, seen] @ query[head, place] / DIM**0.5).softmax(0).tolist()
                    for index, weight in zip(seen, weights, strict=True):
                        mass[group][index] = mass[group].get(index, 0.0) + weight * GROUPS / HEADS
        step(model, cache, part)
        start += len(part)
        for group in range(GROUPS):
            found = cache.layers[0].attention_scores[group].tolist()
            expected = [mass[group][index] for index in kept(cache, 0, group)]
            assert found == pytest.approx(expected, abs=1e-10)


# ---- batches ---------------------------------------------------------------------------------------------------------


@METHODS
@GRAD
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_stream_in_a_ragged_batch_equals_the_stream_alone(model, method, options, grad, positions):
    """Unequal prefixes, mixtures and lengths: a sample's padding is the same for all of its heads."""
    rows = [stream_parts(SIZES), stream_parts(OTHER_SIZES, prefix=5, seed=1), stream_parts([(9, 2), (0, 1)], seed=2)]
    together = new_cache(method, position_ids=positions, **options)
    with torch.set_grad_enabled(grad):
        hidden = stream(model, together, batch_parts(*rows))
        asked = run(model, together, ask(together, 3), text=True)
        for sample, parts in enumerate(rows):
            alone = new_cache(method, position_ids=positions, **options)
            expected = stream(model, alone, parts)
            answer = run(model, alone, ask(alone, 1), text=True)
            for ours, one in zip(hidden, expected, strict=False):
                assert (ours[sample, : one.shape[1]] - one[0]).abs().max() <= 1e-12
            assert (asked[sample] - answer[0]).abs().max() <= 1e-12
            for layer in range(3):
                for head in range(GROUPS):
                    row = sample * GROUPS + head
                    assert kept(together, layer, row) == kept(alone, layer, head)
                    real = together.token_metadata(layer).valid[row]
                    for name in ("keys", "values"):
                        ours, theirs = (getattr(cache.layers[layer], name) for cache in (together, alone))
                        assert (ours[row, 0, real] - theirs[head, 0]).abs().max() <= 1e-12


def ask(cache, samples: int) -> ChunkInputs:
    """Four tokens after the memory."""
    embeds = text_part(4, 0, seed=7).embeds.expand(samples, -1, -1)
    return ChunkInputs.text(embeds, cache.next_position_id)


@torch.no_grad()
@METHODS
def test_what_stands_in_the_padding_of_a_row_does_not_matter(model, method, options):
    rows = [stream_parts(SIZES), stream_parts(OTHER_SIZES, prefix=5, seed=1)]
    steps, outputs = batch_parts(*rows), []
    for spoilt in (False, True):
        cache = new_cache(method, **options)
        stream(model, cache, steps[:3])
        holes = 0
        for layer in cache.layers if spoilt else ():
            hole = ~layer.metadata.valid[:, None, :, None]
            holes += int(hole.sum())
            layer.keys.masked_fill_(hole, 1e3)
            layer.values.masked_fill_(hole, -1e6)
        assert not spoilt or holes > 0
        real = steps[3].valid
        outputs.append(step(model, cache, steps[3])[real])
        outputs[-1] = torch.cat((outputs[-1].flatten(), run(model, cache, ask(cache, 2), text=True).flatten()))
    assert torch.equal(*outputs)


@METHODS
@pytest.mark.parametrize("samples", [1, 2])
def test_in_place_and_functional_memories_are_equal(model, method, options, samples):
    rows = [stream_parts(SIZES), stream_parts(OTHER_SIZES, prefix=5, seed=1)][:samples]
    parts = batch_parts(*rows) if samples > 1 else rows[0]
    caches, outputs = [new_cache(method, **options), new_cache(method, **options)], []
    for cache, grad in zip(caches, (False, True), strict=True):
        with torch.set_grad_enabled(grad):
            outputs.append(stream(model, cache, parts))
    for ours, theirs, part in zip(*outputs, parts, strict=True):
        real = slice(None) if part.valid is None else part.valid
        assert (ours - theirs)[real].abs().max() <= 1e-12
    for layer in range(3):
        for row in range(samples * GROUPS):
            assert kept(caches[0], layer, row) == kept(caches[1], layer, row)


# ---- states and questions --------------------------------------------------------------------------------------------


@METHODS
@GRAD
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("question", [4, 300], ids=["short", "buffer-grows"])
def test_scratch_leaves_no_trace(model, method, options, grad, samples, question):
    rows = [stream_parts(SIZES), stream_parts(SIZES[::-1], prefix=5, seed=1)][:samples]
    parts = batch_parts(*rows) if samples > 1 else rows[0]
    asked, untouched = new_cache(method, **options), new_cache(method, **options)
    with torch.set_grad_enabled(grad):
        for cache in (asked, untouched):
            stream(model, cache, parts[:5])
        before, nbytes = held(asked), asked.nbytes
        with asked.scratch():
            text = [text_part(question + i, 90 + i, seed=i) for i in range(samples)]
            run(model, asked, ChunkInputs.batch(text), text=True)
            assert asked.token_metadata(0).index.shape == (samples * GROUPS, before[-1][1] + question + samples - 1)
            run(model, asked, ask(asked, samples), text=True)
        assert same(before, held(asked)) and asked.nbytes == nbytes
        for part in parts[5:]:
            assert torch.equal(*(step(model, cache, part) for cache in (asked, untouched)))
        assert same(held(asked), held(untouched))


@METHODS
def test_a_functional_cache_returns_to_any_snapshot(model, method, options):
    parts = stream_parts(SIZES)
    cache = new_cache(method, **options)
    stream(model, cache, parts[:3])
    moment, before = cache.snapshot(), held(cache)
    futures = []
    for _ in range(2):
        for part in parts[3:]:
            step(model, cache, part)
        futures.append(held(cache))
        cache.restore(moment)
        assert same(before, held(cache))
    assert same(*futures) and not same(before, futures[0])


@METHODS
def test_gradients_reach_what_each_head_retains_and_nothing_it_evicts(model, method, options):
    """In the last layer a dropped state is needed by nobody; what head 0 dropped head 1 may still hold."""
    parts = stream_parts(SIZES)
    cache = new_cache(method, profile((6, 3), (6, 3), (6, 3)), **options)
    run(model, cache, parts[0], text=True)
    run(model, cache, parts[1])
    run(model, cache, parts[2])
    first = cache.layers[2].values
    first.retain_grad()
    cache.compress()
    held_by = [kept(cache, 2, row) for row in range(GROUPS)]
    run(model, cache, ask(cache, 1), text=True).square().sum().backward()
    model.zero_grad()
    for row in range(GROUPS):
        reached = first.grad[row, 0].abs().amax(-1) > 0
        assert reached.nonzero()[:, 0].tolist() == held_by[row]


@torch.no_grad()
@METHODS
def test_bytes_are_those_of_the_heads_together(model, method, options):
    cache = new_cache(method, **options)
    stream(model, cache, stream_parts([*SIZES, *SIZES]))
    assert cache.kv_nbytes == sum(cache.lengths()) * GROUPS * DIM * 2 * 8
    assert cache.lengths() == [3 + budget.total for budget in BUDGETS.layers]
    assert cache.mean_token_counts() == {"text": 3, "visual": (6 + 2 + 25) / 3, "audio": (3 + 9 + 1) / 3}


# ---- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["h2o", "snapkv", "infinipot_v"])
def test_generate_equals_a_greedy_loop_by_hand(tiny64, method):
    budgets = BudgetProfile.uniform(tiny64.config, mean=40, ratio=2.0)
    session = StreamingSession(tiny64, budgets, method, StreamSettings(chunk_seconds=4, max_seconds=8))
    for _ in session.watch(WEBB):
        pass
    memory, flow, encoder = session.cache, Stream(tiny64, session.cache), session._encoder
    assert encoder is not None and memory.token_metadata(0).index.shape[0] == 2
    assert any(kept(memory, layer, 0) != kept(memory, layer, 1) for layer in range(3))
    before, tokens = held(memory), []
    with torch.no_grad(), memory.scratch():
        flow.forward(encoder.closing(), text=True)
        ids = tiny64.question_ids("What is seen?")
        for _ in range(5):
            assert memory.next_position_id is not None
            part = ChunkInputs.text(tiny64.embed(ids), memory.next_position_id)
            tokens.append(int(tiny64.lm_head(flow.forward(part, text=True)[:, -1]).argmax()))
            ids = torch.tensor([tokens[-1:]])
    with session._question_inputs("What is seen?") as inputs:
        output = tiny64.model.generate(
            **inputs, do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=tiny64.tokenizer.pad_token_id
        )
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == tokens
    question = tiny64.question_ids("What is seen?")[0]
    with torch.no_grad():
        logits, _ = flow.answer_logits(encoder.closing(), [question], [torch.tensor(tokens)])
    assert logits.argmax(-1).tolist() == tokens
    assert same(before, held(memory))

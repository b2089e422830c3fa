"""Under the position id policy `compact` retained tokens are given consecutive ids, exactly, and for ever in range."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5OmniTextConfig, Qwen2_5OmniThinkerTextModel
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import apply_rotary_pos_emb

from clips import WEBB
from omnimem.backbones import ChunkInputs
from omnimem.budget import BudgetProfile
from omnimem.forward import Stream
from omnimem.memory import CompressedCache, attach
from omnimem.memory.compact_position_ids import CompactPositionIds
from omnimem.memory.rotary import Rotary
from omnimem.modality import AUDIO, TEXT, VISUAL
from omnimem.selection import build_selection
from omnimem.selection.base import PositionIdPolicy
from omnimem.stream import StreamingSession
from omnimem.stream_settings import StreamSettings
from omnimem.token_metadata import TokenMetadata
from oracles import (
    WIDTH,
    batch_parts,
    held,
    idle_part,
    kept,
    media_part,
    offline,
    profile,
    run,
    same,
    step,
    stream,
    stream_parts,
    text_model,
    text_part,
)

BUDGETS = profile((6, 3), (2, 9), (12, 1))
AMPLE = profile((500, 500), (500, 500), (500, 500))
SIZES = [(5, 2), (8, 4), (3, 0), (0, 6), (9, 3), (1, 1), (7, 5)]
OTHER_SIZES = [(2, 6), (4, 4), (9, 1)]
GRAD = pytest.mark.parametrize("grad", [False, True], ids=["in-place", "functional"])
METHODS = pytest.mark.parametrize(
    "method", ["streaming_llm", "h2o", "snapkv", "infinipot_v", "streammem", "hermes", "hermes_released", "omnimem"]
)
SOME = pytest.mark.parametrize("method", ["streaming_llm", "h2o", "streammem", "hermes", "omnimem"])


@pytest.fixture(scope="module")
def model():
    model = text_model()
    attach(model)
    return model


def new_cache(
    method: str = "streaming_llm", budgets: BudgetProfile = BUDGETS, positions: PositionIdPolicy = "compact", **options
) -> Any:
    return CompressedCache(budgets, build_selection(method, position_ids=positions, **options))


# ---- rotations -------------------------------------------------------------------------------------------------------


def yarn_model() -> Qwen2_5OmniThinkerTextModel:
    """A decoder whose rotary embedding scales its angles and their cosines."""
    config = Qwen2_5OmniTextConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32768, pad_token_id=0,
        rope_parameters={
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
        },
    )  # fmt: skip
    return Qwen2_5OmniThinkerTextModel(config).double().eval()


def rotary_states(dtype, largest: int = 100_000) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 2, 40, 8, generator=generator, dtype=torch.float64).to(dtype)
    return states, torch.randint(0, largest, (2, 40, 3), generator=generator)


@pytest.mark.parametrize("build", [text_model, yarn_model], ids=["default", "yarn"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2.0**-7)]
)
def test_a_rotation_taken_off_leaves_what_was_there(build, dtype, tolerance):
    rotary = Rotary(build().rotary_emb)
    states, ids = rotary_states(dtype)
    rotated = rotary.rotate(states, ids)
    back = rotary.unrotate(rotated, ids)
    assert rotated.dtype == back.dtype == dtype
    assert (back - states).abs().max() <= tolerance * states.abs().max()
    assert (rotary.rotate(rotary.unrotate(states, ids), ids) - states).abs().max() <= tolerance * states.abs().max()
    assert (rotated - states).abs().max() > 1


@pytest.mark.parametrize("build", [text_model, yarn_model], ids=["default", "yarn"])
def test_keys_are_rotated_as_the_decoder_rotates_them(build):
    model = build()
    states, ids = rotary_states(torch.float64)
    cos, sin = model.rotary_emb(states, ids.permute(2, 0, 1))
    _, expected = apply_rotary_pos_emb(states, states, cos, sin)
    assert (Rotary(model.rotary_emb).rotate(states, ids) - expected).abs().max() <= 1e-15


def raw_keys(model, parts: list[ChunkInputs]) -> Tensor:
    """Keys ``[1, G, N, D]`` of the first layer before any rotation: its input does not depend on the memory."""
    layer = model.layers[0]
    embeds = torch.cat([part.embeds for part in parts], 1)
    keys = layer.self_attn.k_proj(layer.input_layernorm(embeds))
    return keys.unflatten(-1, (-1, 8)).transpose(1, 2)


def rotated_by_hand(states: Tensor, ids: list[list[int]], theta: float = 1e4) -> Tensor:
    """M-RoPE of states ``[G, N, 8]``: frequencies 0, 1 turn with time, 2 with height, 3 with width (in float32)."""
    axis = [0, 0, 1, 2]
    result = torch.zeros_like(states)
    for column, place in enumerate(ids):
        for pair in range(4):
            frequency = 1.0 / (theta ** (torch.tensor(2.0 * pair) / 8))
            angle = torch.tensor(float(place[axis[pair]])) * frequency
            cos, sin = angle.cos().double(), angle.sin().double()
            a, b = states[:, column, pair], states[:, column, pair + 4]
            result[:, column, pair] = a * cos - b * sin
            result[:, column, pair + 4] = b * cos + a * sin
    return result


@torch.no_grad()
def test_keys_stored_under_original_are_raw_keys_rotated_to_their_ids(model):
    cache, parts = new_cache(positions="original"), stream_parts(SIZES)
    stream(model, cache, parts)
    raw, table, layer = raw_keys(model, parts), cache.token_metadata(0), cache.layers[0]
    index = table.index[0]
    rotary = Rotary(model.rotary_emb)
    assert (rotary.rotate(raw[:, :, index], table.position_ids) - layer.keys).abs().max() <= 1e-12
    assert (rotary.unrotate(layer.keys, table.position_ids) - raw[:, :, index]).abs().max() <= 1e-12
    assert (rotated_by_hand(raw[0, :, index], table.position_ids[0].tolist()) - layer.keys[0]).abs().max() <= 1e-6


# ---- the numbers -----------------------------------------------------------------------------------------------------


def numbered(rows: list[list[tuple[tuple[int, int, int], int]]], start: int) -> tuple[list, int]:
    """One sample by the book: rows of ((time, height, width), kind), one a layer (or head) → their ids, and the next.

    Distinct time ids of what is not text before the media become consecutive; all rows end right before the next id.
    """
    media = [[(ids, kind) for ids, kind in row if ids[0] >= start] for row in rows]
    distinct = [sorted({ids[0] for ids, _ in row}) for row in media]
    following = start
    for row, times in zip(media, distinct, strict=True):
        following = max(following, start + len(times))
        for (_, height, width), kind in row:
            if kind == VISUAL:
                following = max(following, height + 1, width + 1)
    result = []
    for row, times in zip(rows, distinct, strict=True):
        new = []
        for ids, kind in row:
            if ids[0] < start:
                new.append(ids)
                continue
            time = following - len(times) + times.index(ids[0])
            new.append((time, *ids[1:]) if kind == VISUAL else (time, time, time))
        result.append(new)
    return result, following


def facts(table: TokenMetadata, row: int) -> list[tuple[tuple[int, int, int], int]]:
    """Ids and kind of the real tokens of a row."""
    real = table.valid[row]
    return [
        (tuple(ids), kind)
        for ids, kind in zip(table.position_ids[row][real].tolist(), table.modality[row][real].tolist(), strict=True)
    ]


def random_table(generator: torch.Generator, rows: int, length: int, prefix: int) -> TokenMetadata:
    """Text at ids below the prefix, then anything at gapped ids, some of them equal; columns missing at random."""
    kinds = torch.randint(0, 3, (rows, length), generator=generator, dtype=torch.int8)
    kinds[:, :prefix] = TEXT
    time = prefix + 7 * torch.randint(0, length, (rows, length), generator=generator).sort(1).values
    time[:, :prefix] = torch.arange(prefix)
    place = prefix + torch.randint(0, 4, (rows, length, 2), generator=generator)
    position = torch.cat((time[..., None], torch.where((kinds == VISUAL)[..., None], place, time[..., None])), -1)
    valid = torch.rand(rows, length, generator=generator) < 0.8
    nothing = torch.zeros(rows, length)
    return TokenMetadata(torch.arange(length).expand(rows, -1), position, nothing, kinds, valid)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", [1, 2], ids=["samples", "per-head"])
@pytest.mark.parametrize("seed", range(5))
def test_ids_are_those_of_a_list(batch, heads, seed):
    """Layers of different lengths, samples that start at different ids, padding anywhere, rows per head."""
    generator = torch.Generator().manual_seed(seed)
    prefix = 4
    tables = [random_table(generator, batch * heads, length, prefix) for length in (9, 20, 4, 31)]
    numbering = CompactPositionIds()
    numbering.start = torch.randint(prefix, prefix + 3, (batch,), generator=generator)
    found = numbering.renumber(tables, batch)
    assert numbering.next is not None
    for sample in range(batch):
        places = range(sample * heads, (sample + 1) * heads)
        rows = [facts(table, row) for table in tables for row in places]
        expected, following = numbered(rows, int(numbering.start[sample]))
        assert [[ids for ids, _ in facts(table, row)] for table in found for row in places] == expected
        assert numbering.next[sample] == following
    for old, new in zip(tables, found, strict=True):
        assert all(torch.equal(getattr(old, name), getattr(new, name)) for name in ("index", "modality", "valid"))


def test_ids_that_are_consecutive_do_not_change():
    numbering = CompactPositionIds()
    numbering.start = torch.tensor([4])
    (once,) = numbering.renumber([random_table(torch.Generator().manual_seed(1), 1, 30, 4)], 1)
    following = numbering.next
    (twice,) = numbering.renumber([once], 1)
    assert torch.equal(once.position_ids[once.valid], twice.position_ids[twice.valid])
    assert following is not None and numbering.next is not None and torch.equal(following, numbering.next)


@METHODS
@pytest.mark.parametrize("samples", [1, 2])
def test_after_every_chunk_ids_of_all_layers_follow_the_definition(model, method, samples):
    """Whatever the method keeps or merges; text in the middle of the stream is numbered with the media around it."""
    cache = new_cache(method)
    rows = [stream_parts(SIZES), stream_parts(OTHER_SIZES, prefix=5, seed=1)]
    starts = [int(row[0].next_position_id[0]) for row in rows]
    before: list[TokenMetadata] = []

    class Watched(CompactPositionIds):
        def renumber(self, tables, batch):
            before[:] = tables
            return super().renumber(tables, batch)

    cache._compact_ids = Watched()
    steps = batch_parts(*rows) if samples == 2 else rows[0]
    with torch.no_grad():
        cache.assign_position_ids(
            steps[0].position_ids, steps[0].modality, steps[0].valid, steps[0].next_position_id, text=True
        )
        run(model, cache, steps[0], text=True)
        for number, part in enumerate(steps[1:]):
            if number == 2:
                note = [text_part(2, int(end), seed=9) for end in steps[number].next_position_id]
                positions, following = cache.assign_position_ids(
                    *(ChunkInputs.batch(note).position_ids, ChunkInputs.batch(note).modality, None),
                    torch.cat([one.next_position_id for one in note]),
                    text=True,
                )
                placed = replace(ChunkInputs.batch(note), position_ids=positions, next_position_id=following)
                run(model, cache, placed, text=True)
            step(model, cache, part)
            heads = len(cache.token_metadata(0).index) // samples
            for sample in range(samples):
                places = range(sample * heads, (sample + 1) * heads)
                expected, following = numbered(
                    [facts(table, row) for table in before for row in places], starts[sample]
                )
                found = [facts(cache.token_metadata(layer), row) for layer in range(3) for row in places]
                assert [[ids for ids, _ in row] for row in found] == expected
                assert cache.next_position_id[sample] == following
                for row in found:
                    times = sorted({ids[0] for ids, _ in row if ids[0] >= starts[sample]})
                    assert times == list(range(following - len(times), following))


def interleaved(start: int, seed: int) -> ChunkInputs:
    """Two frames of 2×2 and four audio tokens, one of them at the time id of each frame; heights and widths from 5."""
    time = [0, 0, 0, 0, 0, 2, 4, 4, 4, 4, 4, 6]
    kind = [VISUAL] * 4 + [AUDIO] * 2 + [VISUAL] * 4 + [AUDIO] * 2
    place = [(0, 0), (0, 1), (1, 0), (1, 1), None, None] * 2
    ids = [
        (start + t, 5 + p[0], 5 + p[1]) if p is not None else (start + t,) * 3 for t, p in zip(time, place, strict=True)
    ]
    generator = torch.Generator().manual_seed(seed)
    return ChunkInputs(
        embeds=torch.randn(1, 12, WIDTH, generator=generator, dtype=torch.float64),
        position_ids=torch.tensor(ids).T[:, None],
        modality=torch.tensor([kind], dtype=torch.int8),
        time=torch.tensor([time]).float() + start,
        next_position_id=torch.tensor([start + 7]),
    )


@torch.no_grad()
def test_video_and_audio_of_one_moment_keep_one_id(model):
    """Spelt out: prefix 0…4 and two chunks of two frames and four audio tokens, of which the most recent stay."""
    cache = new_cache("streaming_llm", profile((4, 2), (8, 4), (4, 1)), num_sink_tokens=0)
    parts = [text_part(5, 0), interleaved(5, 0), interleaved(15, 1)]
    stream(model, cache, parts)
    text = [[i, i, i] for i in range(5)]

    def picture(time: int) -> list[list[int]]:
        return [[time, 5 + h, 5 + w] for h in (0, 1) for w in (0, 1)]

    # The second layer keeps one whole chunk, whose ids 15, 17, 19, 21 become the four before the next chunk.
    assert cache.token_metadata(1).position_ids[0].tolist() == [
        *text,
        *picture(5),
        [5] * 3,
        [6] * 3,
        *picture(7),
        [7] * 3,
        [8] * 3,
    ]
    # The first: one frame with its audio, and the audio after it; the third: the last audio without its frame's.
    assert cache.token_metadata(0).position_ids[0].tolist() == [*text, *picture(7), [7] * 3, [8] * 3]
    assert cache.token_metadata(2).position_ids[0].tolist() == [*text, *picture(7), [8] * 3]
    assert cache.next_position_id.tolist() == [9]


# ---- the keys --------------------------------------------------------------------------------------------------------


def dense_parts(count: int, length: int = 6) -> list[ChunkInputs]:
    """A stream whose time ids are consecutive already, two tokens of frame and audio on each."""
    parts = [text_part(3, 0)]
    for number in range(count):
        start = int(parts[-1].next_position_id[0])
        part = media_part(length, length, start, float(number), seed=number)
        time = start + torch.arange(2 * length) // 2
        seen = part.modality[0] == VISUAL
        place = part.position_ids[1:, 0] - start + 3
        positions = torch.stack((time, *(torch.where(seen, axis, time) for axis in place)))[:, None]
        parts.append(replace(part, position_ids=positions, next_position_id=torch.tensor([start + length])))
    return parts


@METHODS
@GRAD
def test_with_ids_that_are_dense_and_budgets_that_suffice_nothing_changes(model, method, grad):
    parts = dense_parts(6)
    question = text_part(4, int(parts[-1].next_position_id[0]), seed=5)
    outputs = []
    for positions in ("original", "compact"):
        cache = new_cache(method, AMPLE, positions)
        with torch.set_grad_enabled(grad):
            hidden = [*stream(model, cache, parts), run(model, cache, question, text=True)]
        outputs.append(
            (hidden, [cache.token_metadata(layer).position_ids for layer in range(3)], cache.next_position_id)
        )
    (ours, ids, following), (expected, known, after) = outputs
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() <= 1e-12
    assert all(torch.equal(a, b) for a, b in zip(ids, known, strict=True))
    assert torch.equal(following, after)


def long_part(number: int) -> ChunkInputs:
    """A chunk of a stream that takes 400 ids a chunk; heights and widths count from the start of the media, 3."""
    part = media_part(5, 3, 3 + 400 * number, float(number), seed=number)
    part.position_ids[1:] -= torch.where(part.modality == VISUAL, 400 * number, 0)
    return part


@torch.no_grad()
@pytest.mark.parametrize("method", ["streaming_llm", "h2o", "random"])
def test_keys_in_use_are_raw_keys_rotated_to_their_present_ids_however_long_the_stream(model, method):
    """A hundred re-numberings, and nothing has accumulated."""
    cache = new_cache(method)
    parts = [text_part(3, 0), *(long_part(number) for number in range(100))]
    raw = raw_keys(model, parts)
    stream(model, cache, parts)
    layer, table = cache.layers[0], cache.token_metadata(0)
    heads = len(table.index)
    used = layer.rotated_keys()
    worst = 0.0
    for row in range(heads):
        of_row = (raw[0] if heads == 1 else raw[0, row : row + 1])[:, table.index[row]]
        cos, sin = model.rotary_emb(raw, table.position_ids[row].T[:, None])
        expected = apply_rotary_pos_emb(of_row[None], of_row[None], cos, sin)[1][0]
        by_hand = rotated_by_hand(of_row, table.position_ids[row].tolist())
        worst = max(worst, (used[row] - expected).abs().max().item())
        assert (used[row] - by_hand).abs().max() <= 1e-6
    assert worst <= 1e-10
    assert table.index.max() > 700 and table.position_ids.max() < 40


@torch.no_grad()
def test_the_decoder_attends_to_the_keys_at_their_present_ids(model):
    """The first layer's attention of a late chunk against a softmax over raw states rotated here."""
    cache, parts = new_cache(), stream_parts([*SIZES, *SIZES])
    stream(model, cache, parts[:-1])
    table, last = cache.token_metadata(0), parts[-1]
    seen: list[Tensor] = []
    attention = model.layers[0].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    positions, following = cache.assign_position_ids(
        last.position_ids, last.modality, last.valid, last.next_position_id
    )
    try:
        run(model, cache, replace(last, position_ids=positions, next_position_id=following))
    finally:
        handle.remove()
    # The chunk stands right after the memory, its own spacing unchanged.
    assert positions[0, 0, 0] == table.position_ids[..., 0].max() + 1
    assert torch.equal(positions[0] - positions[0, 0, 0], last.position_ids[0] - last.position_ids[0, 0, 0])
    layer, shape = model.layers[0], (-1, 8)
    everything = torch.cat([part.embeds for part in parts], 1)
    normed = layer.input_layernorm(everything)
    index = torch.cat((table.index[0], everything.shape[1] - len(last) + torch.arange(len(last))))
    ids = torch.cat((table.position_ids, positions.permute(1, 2, 0)), 1)[0].tolist()
    key = rotated_by_hand(attention.k_proj(normed)[0].unflatten(-1, shape).transpose(0, 1)[:, index], ids)
    value = attention.v_proj(normed)[0].unflatten(-1, shape).transpose(0, 1)[:, index]
    query = attention.q_proj(normed)[0].unflatten(-1, shape).transpose(0, 1)[:, index[-len(last) :]]
    query = rotated_by_hand(query, ids[-len(last) :])
    logits = query @ key.repeat_interleave(2, 0).transpose(1, 2) / 8**0.5
    hidden = torch.ones(len(last), len(index)).tril(len(index) - len(last)) == 0
    expected = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 0)
    assert (seen[0][0] - expected.transpose(0, 1).flatten(1)).abs().max() <= 1e-6


# ---- bounds ----------------------------------------------------------------------------------------------------------


class Ids:
    """The largest rotary id any forward of a decoder was given."""

    def __init__(self, model):
        self.largest = 0
        self.handle = model.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, _model, _args, kwargs):
        self.largest = max(self.largest, int(kwargs["position_ids"].max()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@torch.no_grad()
@SOME
def test_ids_stay_in_range_over_a_hundred_times_longer_stream(model, method):
    """Prefix, largest layer, a chunk as it comes, a probe: that is all, while the encoder's ids leave the range."""
    cache = new_cache(method)
    largest = max(budget.total for budget in BUDGETS.layers)
    with Ids(model) as ids:
        run(model, cache, text_part(3, 0), text=True)
        for number in range(90):
            part = long_part(number)
            step(model, cache, part)
            assert int(cache.next_position_id) <= 3 + largest
            chunk = int(part.next_position_id) - int(part.position_ids[0, 0, 0])
            assert ids.largest < 3 + largest + chunk + 4
    assert int(part.next_position_id) > model.config.max_position_embeddings
    assert int(cache.next_position_id) > 3 + largest // 2


@torch.no_grad()
def test_original_ids_would_have_left_it(model):
    cache = new_cache(positions="original")
    run(model, cache, text_part(3, 0), text=True)
    for number in range(5):
        step(model, cache, long_part(number))
    assert int(cache.next_position_id) > 1600


# ---- batches ---------------------------------------------------------------------------------------------------------


@METHODS
@GRAD
def test_streams_side_by_side_equal_each_alone(model, method, grad):
    """Different prefixes, lengths and mixtures: each sample has its own numbers."""
    rows = [stream_parts(SIZES), stream_parts(OTHER_SIZES, prefix=5, seed=1), stream_parts([(4, 1)], prefix=1, seed=2)]
    steps = batch_parts(*rows)
    together = new_cache(method)
    with torch.set_grad_enabled(grad):
        hidden = stream(model, together, steps)
        asked = run(model, together, ask(together, 3), text=True)
        heads = len(together.token_metadata(0).index) // 3
        for sample, parts in enumerate(rows):
            alone = new_cache(method)
            expected = stream(model, alone, parts)
            for ours, one in zip(hidden, expected, strict=False):
                assert (ours[sample, : one.shape[1]] - one[0]).abs().max() <= 1e-12
            assert together.next_position_id[sample] == alone.next_position_id[0] + 4
            for layer in range(3):
                for head in range(heads):
                    mine = facts(together.token_metadata(layer), sample * heads + head)
                    assert mine[:-4] == facts(alone.token_metadata(layer), head)
            one = run(model, alone, ask(alone, 1), text=True)
            assert (asked[sample] - one[0]).abs().max() <= 1e-12


@METHODS
@GRAD
def test_a_stream_that_begins_late_and_pauses_has_the_ids_of_one_that_does_not(model, method, grad):
    steady, halting = stream_parts(SIZES[:4]), stream_parts(OTHER_SIZES[:2], prefix=5, seed=1)
    waiting = [idle_part(int(part.next_position_id[0])) for part in halting]
    together, alone = new_cache(method), new_cache(method)
    steps = zip(steady, [halting[0], waiting[0], halting[1], waiting[1], halting[2]], strict=True)
    with torch.set_grad_enabled(grad):
        hidden = stream(model, together, [ChunkInputs.batch(list(one)) for one in steps])[::2]
        for ours, expected in zip(hidden, stream(model, alone, halting), strict=True):
            assert (ours[1, : expected.shape[1]] - expected[0]).abs().max() <= 1e-12
    assert together.next_position_id[1] == alone.next_position_id[0]
    for layer in range(3):
        heads = len(alone.token_metadata(layer).index)
        for row in range(heads):
            assert facts(together.token_metadata(layer), heads + row) == facts(alone.token_metadata(layer), row)


def ask(cache, samples: int) -> ChunkInputs:
    """Four tokens at the memory's own ids."""
    embeds = text_part(4, 0, seed=7).embeds.expand(samples, -1, -1)
    return ChunkInputs.text(embeds, cache.next_position_id)


@METHODS
@pytest.mark.parametrize("samples", [1, 2])
def test_in_place_and_functional_memories_are_equal(model, method, samples):
    rows = [stream_parts(SIZES), stream_parts(OTHER_SIZES, prefix=5, seed=1)][:samples]
    parts = batch_parts(*rows) if samples > 1 else rows[0]
    caches, outputs = [new_cache(method), new_cache(method)], []
    for cache, grad in zip(caches, (False, True), strict=True):
        with torch.set_grad_enabled(grad):
            outputs.append(stream(model, cache, parts))
    for ours, theirs, part in zip(*outputs, parts, strict=True):
        real = slice(None) if part.valid is None else part.valid
        assert (ours - theirs)[real].abs().max() <= 1e-12
    for layer in range(3):
        ours, theirs = (cache.token_metadata(layer) for cache in caches)
        assert torch.equal(ours.valid, theirs.valid)
        for row in range(len(ours.index)):
            assert kept(caches[0], layer, row) == kept(caches[1], layer, row)
            assert facts(ours, row) == facts(theirs, row)


# ---- questions -------------------------------------------------------------------------------------------------------


@SOME
@GRAD
@pytest.mark.parametrize("samples", [1, 2])
def test_questions_leave_no_trace_and_continue_after_the_cache(model, method, grad, samples):
    rows = [stream_parts(SIZES), stream_parts(OTHER_SIZES, prefix=5, seed=1)][:samples]
    parts = batch_parts(*rows) if samples > 1 else rows[0]
    asked, untouched = new_cache(method), new_cache(method)
    with torch.set_grad_enabled(grad):
        for cache in (asked, untouched):
            stream(model, cache, parts[:4])
        before, numbers = held(asked), asked._compact_ids.state()
        last = [
            max(ids[0] for ids, _ in facts(asked.token_metadata(0), row))
            for row in range(0, len(asked.token_metadata(0).index), len(asked.token_metadata(0).index) // samples)
        ]
        assert asked.next_position_id.tolist() == [one + 1 for one in last]
        for _ in range(2):
            with asked.scratch():
                # Closing tokens come at the encoder's ids and are placed; the question follows them.
                end = parts[3].next_position_id
                closing = ChunkInputs.text(text_part(2, 0).embeds.expand(samples, -1, -1), end)
                positions, following = asked.assign_position_ids(
                    closing.position_ids, closing.modality, None, end + 2, text=True
                )
                assert positions[:, :, 0].tolist() == [[one + 1 for one in last]] * 3
                run(model, asked, replace(closing, position_ids=positions, next_position_id=following), text=True)
                assert asked.next_position_id.tolist() == [one + 3 for one in last]
                run(model, asked, ask(asked, samples), text=True)
                assert asked.token_metadata(0).position_ids[0, -1].tolist() == [last[0] + 6] * 3
            assert same(before, held(asked))
            assert all(a is b for a, b in zip(numbers, asked._compact_ids.state(), strict=True))
        for part in parts[4:]:
            ours, theirs = (step(model, cache, part) for cache in (asked, untouched))
            assert torch.equal(ours, theirs)
        assert same(held(asked), held(untouched))


@torch.no_grad()
def test_a_question_between_two_chunks_and_their_compression_changes_nothing(model):
    """Chunks and text that come without a compression in between keep their distance from each other."""
    parts = stream_parts(SIZES)
    memories = []
    for interrupted in (False, True):
        cache = new_cache("omnimem", lambda_=1.0)
        stream(model, cache, parts[:4])
        first = None
        for part in parts[4:6]:
            positions, following = cache.assign_position_ids(
                part.position_ids, part.modality, part.valid, part.next_position_id
            )
            run(model, cache, replace(part, position_ids=positions, next_position_id=following))
            if interrupted:
                with cache.scratch():
                    run(model, cache, ask(cache, 1), text=True)
            first = positions - part.position_ids if first is None else first
            assert positions[0, 0, 0] - part.position_ids[0, 0, 0] == first[0, 0, 0] != 0
        cache.compress()
        memories.append(held(cache))
    assert same(*memories)


@torch.no_grad()
def test_a_reset_cache_has_no_ids_left(model):
    used, fresh = new_cache(), new_cache()
    stream(model, used, stream_parts(OTHER_SIZES, prefix=7, seed=3))
    used.reset()
    for ours, theirs in zip(*(stream(model, cache, stream_parts(SIZES)) for cache in (used, fresh)), strict=True):
        assert torch.equal(ours, theirs)
    assert same(held(used), held(fresh))


def test_a_cache_without_the_rotation_raises():
    cache = new_cache()
    one = torch.zeros(1, 1, dtype=torch.int64)
    cache.begin(one.expand(3, 1, 1))
    with pytest.raises(RuntimeError, match="rotary embedding"):
        cache.layers[0].update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))


# ---- the stream and the session --------------------------------------------------------------------------------------


TRAINED = pytest.mark.parametrize(
    ("method", "positions"),
    [
        ("streaming_llm", None),
        ("streaming_llm", "original"),
        ("h2o", None),
        ("h2o", "compact"),
        ("snapkv", None),
        ("streammem", None),
        ("streammem", "compact"),
        ("hermes", None),
        ("hermes", "original"),
        ("hermes_released", None),
        ("omnimem", None),
        ("omnimem", "compact"),
    ],
)


def watched(model, method: str, positions, samples: int) -> tuple[Any, list[ChunkInputs]]:
    rows = [stream_parts(SIZES[:5]), stream_parts(OTHER_SIZES, prefix=5, seed=1)][:samples]
    parts = batch_parts(*rows) if samples > 1 else rows[0]
    cache = CompressedCache(BUDGETS, build_selection(method, position_ids=positions))
    if torch.is_grad_enabled():
        for part in parts:
            part.embeds.requires_grad_()
    flow = Stream(offline(model), cache)
    flow.forward(parts[0], text=True)
    for part in parts[1:]:
        flow.step(part)
    return cache, parts


@TRAINED
@pytest.mark.parametrize("samples", [1, 2])
def test_what_training_streams_is_what_inference_streams(model, method, positions, samples):
    answers, ids = [], []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            cache, _ = watched(model, method, positions, samples)
            with cache.scratch():
                answers.append(run(model, cache, ask(cache, samples), text=True))
            ids.append(
                [
                    facts(cache.token_metadata(n), row)
                    for n in range(3)
                    for row in range(len(cache.token_metadata(n).index))
                ]
            )
    assert (answers[0] - answers[1]).abs().max() <= 1e-12
    assert ids[0] == ids[1]


@TRAINED
@pytest.mark.parametrize("samples", [1, 2])
def test_gradients_pass_exactly_through_a_compression(model, method, positions, samples):
    """Finite differences of everything a memory holds after one with respect to all it held before it."""
    cache, parts = watched(model, method, positions, samples)
    compress = cache.compress
    taken: list[Any] = []

    def noted(replay=None, log_evicted=False):
        taken.append(cache.snapshot())
        return compress(replay, log_evicted)

    cache.compress = noted
    decided = Stream(offline(model), cache).step(parts[1])
    cache.compress = compress
    (before,) = taken
    cache.restore(before)
    lengths = cache.lengths()
    assert any(len(kept.columns[0]) < lengths[n] for n, kept in enumerate(decided))
    if cache.method.probes:
        assert any(kept.merged is not None for kept in decided)

    def compressed(*states: Tensor) -> tuple[Tensor, ...]:
        cache.restore(before)
        cache.differentiable_state = dict(zip(order, states, strict=True))
        cache.compress(decided)
        return tuple(held for layer in cache.layers for held in (layer.rotated_keys(), layer.values))

    order = list(cache.differentiable_state)
    leaves = [state.detach().requires_grad_() for state in cache.differentiable_state.values()]
    assert torch.autograd.gradcheck(compressed, leaves, fast_mode=True, atol=1e-7)


@pytest.fixture(scope="module")
def session(tiny64) -> StreamingSession:
    budgets = BudgetProfile.uniform(tiny64.config, mean=40, ratio=2.0)
    return StreamingSession(tiny64, budgets, "streaming_llm", StreamSettings(chunk_seconds=4, max_seconds=12))


def test_a_session_watches_and_answers_at_the_ids_of_the_cache(session, tiny64):
    """generate() goes on at `next_position_id`, which is that of the memory and not of the clip."""
    recorded: list[Tensor] = []
    handle = tiny64.language_model.register_forward_pre_hook(
        lambda _model, _args, kwargs: recorded.append(kwargs["position_ids"].clone()), with_kwargs=True
    )
    answers = []
    for event in session.watch(WEBB):
        before = held(session.cache)
        encoder, memory = session._encoder, session.cache
        assert encoder is not None and memory.next_position_id is not None
        after = int(memory.next_position_id)
        assert after == max(int(memory.token_metadata(layer).position_ids.max()) for layer in range(3)) + 1
        assert after <= encoder.start + 16 + 40 * 2
        recorded.clear()
        answers.append(session.ask("What is seen?", max_new_tokens=4, min_new_tokens=4))
        closing, *asked = recorded
        assert closing.unique().tolist() == [after]
        ids = torch.cat(asked, -1)
        assert ids[0, 0].tolist() == list(range(after + 1, after + 1 + ids.shape[-1]))
        assert (ids == ids[:1]).all() and len(asked) == 4
        assert same(before, held(memory))
        assert event.retained["visual"] <= 40
    handle.remove()
    assert encoder.next_position_id > 200 > after, "the clip's own ids are far past"
    assert session.ask("What is seen?", max_new_tokens=4, min_new_tokens=4) == answers[-1]


def test_a_generated_answer_is_the_greedy_one(session, tiny64):
    for _ in session.watch(WEBB):
        pass
    memory = session.cache
    flow = Stream(tiny64, memory)
    with torch.no_grad(), memory.scratch():
        flow.forward(session._encoder.closing(), text=True)
        ids, tokens = tiny64.question_ids("What is heard?"), []
        for _ in range(5):
            part = ChunkInputs.text(tiny64.embed(ids), memory.next_position_id)
            hidden = run(tiny64.language_model, memory, part, text=True)
            tokens.append(int(tiny64.lm_head(hidden[:, -1]).argmax()))
            ids = torch.tensor([tokens[-1:]])
    with session._question_inputs("What is heard?") as inputs:
        output = tiny64.model.generate(
            **inputs, do_sample=False, max_new_tokens=5, min_new_tokens=5, eos_token_id=None,
            pad_token_id=tiny64.tokenizer.pad_token_id,
        )  # fmt: skip
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == tokens
    question, answer = tiny64.question_ids("What is heard?")[0], torch.tensor(tokens)
    with torch.no_grad():
        logits, targets = flow.answer_logits(session._encoder.closing(), [question], [answer])
    assert targets.tolist() == tokens == logits.argmax(-1).tolist()

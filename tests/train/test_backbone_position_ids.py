"""Compact position ids of long streams on backbones with deepstack and fractional ids."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import omnimem.backbones.qwen3_omni.stream_encoder as qwen3_omni_encoder
import omnimem.backbones.qwen3_vl.stream_encoder as qwen3_vl_encoder
from omnimem.backbones import Backbone, load_backbone
from omnimem.backbones.vision import FramePatches
from omnimem.budget import BudgetProfile
from omnimem.forward import Stream
from omnimem.media import Chunk
from omnimem.memory import CompressedCache
from omnimem.memory.compact_position_ids import CompactPositionIds
from omnimem.modality import TEXT, VISUAL
from omnimem.selection import build_selection
from omnimem.token_metadata import TokenMetadata


def by_hand(rows: list[list[Any]], start: float, spatial_ids_advance: bool) -> tuple[list[list[Any]], float]:
    """One sample: rows of ((time, height, width), kind), one per layer → their new ids, and the next.

    Walk through the ids from `start` on and skip those that no token has; a frame that moves with its time has the ids
    of all its sides.
    """
    walked, ends = [], []
    for row in rows:
        taken, gap, moves = start, 0.0, {}
        for time in sorted({ids[0] for ids, _ in row if ids[0] >= start}):
            gap += max(0.0, time - taken)
            moves[time] = gap
            sides = [
                s for ids, kind in row if spatial_ids_advance and kind == VISUAL and ids[0] == time for s in ids[1:]
            ]
            taken = max([taken, time + 1, *(side + 1 for side in sides)])
        walked.append(moves)
        ends.append(taken - gap)
    beside = [s + 1 for row in rows for ids, kind in row if kind == VISUAL and not spatial_ids_advance for s in ids[1:]]
    following = max([start, *ends, *beside])
    result = []
    for row, moves, end in zip(rows, walked, ends, strict=True):
        new = []
        for (time, height, width), kind in row:
            move = following - end - moves[time] if time in moves else 0
            sides = (height, width) if kind == VISUAL and not spatial_ids_advance else (height + move, width + move)
            new.append((time + move, *sides))
        result.append(new)
    return result, following


def facts(table: TokenMetadata, row: int = 0) -> list[tuple[tuple[float, float, float], int]]:
    real = table.valid[row]
    return [
        (tuple(ids), kind)
        for ids, kind in zip(table.position_ids[row][real].tolist(), table.modality[row][real].tolist(), strict=True)
    ]


SPAN, SIDE, PATCHES = 2.0, 3, 4


def stubbed(monkeypatch, backbone: Backbone, seed: int = 0) -> Any:
    """An encoder whose towers return noise: chunks of 2 s are four temporal patches of 3×3 and, if supported, audio."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def frames(_backbone: Any, frames: np.ndarray, _limits: Any) -> FramePatches:
        count = len(frames) // 2
        return FramePatches(noise(count, SIDE**2, 64), noise(3, count, SIDE**2, 64), SIDE, SIDE)

    monkeypatch.setattr(qwen3_vl_encoder, "encode_frames", frames)
    monkeypatch.setattr(qwen3_omni_encoder, "encode_frames", frames)
    sound = backbone.name == "qwen3_omni"
    encoder: Any = backbone.stream_encoder(video=True, audio=sound, fps=2 * PATCHES / SPAN)
    if sound:

        def heard(_chunk: Chunk) -> Tensor:
            encoder.audio_seen += 26
            return noise(26, 64)

        encoder._audio = heard
    return encoder


def fake_chunk(number: int, sound: bool) -> Chunk:
    times = number * SPAN + np.arange(2 * PATCHES) * SPAN / (2 * PATCHES)
    nothing = np.zeros(0, np.float32)
    samples = np.zeros(int(SPAN * 16000), np.float32) if sound else None
    frames = np.zeros((2 * PATCHES, 4, 4, 3), np.uint8)
    return Chunk(number, number * SPAN, (number + 1) * SPAN, frames, times, samples, nothing, nothing, False)


def streamed(monkeypatch, backbone: Backbone, method: str, budget: int, chunks: int, positions: Any = "compact") -> Any:
    """A long stream; its cache, and for each step the metadata before renumbering and the largest id in use."""
    audio = backbone.name == "qwen3_omni"
    profile = BudgetProfile.uniform(backbone.config, budget, 2.0 if audio else float("inf"))
    cache = CompressedCache(profile, build_selection(method, position_ids=positions))
    stream, encoder = Stream(backbone, cache), stubbed(monkeypatch, backbone)
    seen = SimpleNamespace(cache=cache, steps=[], encoder=encoder, used=0.0)
    handle = backbone.language_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: setattr(seen, "used", max(seen.used, float(kwargs["position_ids"].max()))),
        with_kwargs=True,
    )

    class Watched(CompactPositionIds):
        def renumber(self, tables, batch):
            seen.before = list(tables)
            return super().renumber(tables, batch)

    if cache._compact_ids is not None:
        cache._compact_ids = Watched()
    with torch.no_grad():
        stream.forward(encoder.prefix(), text=True)
        for number in range(chunks):
            inputs = encoder.encode(fake_chunk(number, audio))
            stream.step(inputs)
            if cache._compact_ids is not None:
                after = [cache.token_metadata(layer) for layer in range(len(cache.layers))]
                seen.steps.append((seen.before, after, float(cache.next_position_id)))  # pyright: ignore
    handle.remove()
    return seen


METHODS = ("omnimem", "streaming_llm", "h2o", "snapkv", "infinipot_v")


@pytest.mark.parametrize("name", ["video_salmonn2", pytest.param("qwen3_omni", marks=pytest.mark.long)])
@pytest.mark.parametrize("method", METHODS)
def test_ids_of_a_long_stream_stay_bounded_and_equal_a_reference(monkeypatch, tiny_of, name, method):
    backbone = load_backbone(tiny_of(name), dtype="float32", device="cpu")
    seen = streamed(monkeypatch, backbone, method, budget=24, chunks=16)
    start = float(seen.cache._compact_ids.start[0])
    for before, after, following in seen.steps:
        heads = len(before[0].index)
        rows = [facts(table, row) for table in before for row in range(heads)]
        expected, end = by_hand(rows, start, backbone.spatial_ids_advance)
        found = [[ids for ids, _ in facts(table, row)] for table in after for row in range(heads)]
        assert found == expected and following == end
        for table in after:
            for row in range(heads):
                assert_layout(table, row, following, start, backbone.spatial_ids_advance)
    # Text is retained with one id per token; of a frame at least one token is retained, which spans three sides.
    text = max(int((table.modality == TEXT).sum(1).max()) for table in seen.steps[-1][1])
    bound = text + 24 * SIDE + start + 150
    assert seen.used <= bound
    if name == "qwen3_omni":
        assert seen.encoder.next_position_id > 400 > 200 > seen.used
    assert seen.cache.next_position_id.dtype == (torch.float32 if name == "qwen3_omni" else torch.int64)


def assert_layout(table: TokenMetadata, row: int, following: float, start: float, spatial_ids_advance: bool) -> None:
    """Order as streamed, no id past the next one, text after the frames before it, frames unchanged inside."""
    real = table.valid[row]
    position, kind, time = table.position_ids[row][real], table.modality[row][real], table.time[row][real]
    ids = position[:, 0]
    assert (position < following).all() and (position >= 0).all()
    assert (ids.diff() >= 0).all()
    text = ids[kind == TEXT]
    assert (text.diff() >= 1).all()
    if not spatial_ids_advance:
        return
    highest = start - 1
    for one, what in zip(position.tolist(), kind.tolist(), strict=True):
        if what == TEXT and one[0] >= start:
            assert one[0] > highest
        highest = max(highest, *one)
    for moment in time[kind == VISUAL].unique():
        inside = position[(kind == VISUAL) & (time == moment)]
        assert len(inside[:, 0].unique()) == 1
        sides = inside[:, 1:] - inside[:, :1]
        assert (sides >= 0).all() and (sides < SIDE).all() and len(sides.unique(dim=0)) == len(sides)


@pytest.mark.parametrize("name", ["video_salmonn2", "qwen3_omni"])
def test_with_large_budgets_no_id_changes(monkeypatch, tiny_of, name):
    """These layouts have no gaps in their ids, so the ids equal those of the model, however many chunks."""
    backbone = load_backbone(tiny_of(name), dtype="float32", device="cpu")
    ours = streamed(monkeypatch, backbone, "omnimem", 5000, 8)
    theirs = streamed(monkeypatch, backbone, "omnimem", 5000, 8, "original")
    for layer in range(4):
        assert torch.equal(
            ours.cache.token_metadata(layer).position_ids, theirs.cache.token_metadata(layer).position_ids
        )
    assert torch.equal(ours.cache.next_position_id, theirs.cache.next_position_id)
    fractions = ours.cache.token_metadata(0).position_ids % 1
    assert bool(fractions.any()) == (name == "qwen3_omni")


def test_an_example_whose_spatial_ids_advance():
    """Prefix 0, 1; text 2, 3; a frame of 2×3 at 4; text 7; a frame at 8; text 11: the first row of each is retained."""
    picture = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    ids = [(n,) * 3 for n in (0, 1, 2, 3)] + [(4, 4 + h, 4 + w) for h, w in picture] + [(7,) * 3]
    ids += [(8, 8 + h, 8 + w) for h, w in picture] + [(11,) * 3]
    kinds = [TEXT] * 4 + [VISUAL] * 6 + [TEXT] + [VISUAL] * 6 + [TEXT]
    compact_ids = CompactPositionIds()
    compact_ids.spatial_ids_advance, compact_ids.start = True, torch.tensor([2])

    def table(stays: list[int]) -> TokenMetadata:
        nothing = torch.zeros(1, len(stays))
        return TokenMetadata(
            torch.tensor([stays]), torch.tensor([[ids[i] for i in stays]]), nothing,
            torch.tensor([[kinds[i] for i in stays]], dtype=torch.int8), torch.ones(1, len(stays), dtype=torch.bool),
        )  # fmt: skip

    whole = list(range(len(ids)))
    (same,) = compact_ids.renumber([table(whole)], 1)
    assert [tuple(one) for one in same.position_ids[0].tolist()] == ids and compact_ids.next.tolist() == [12]  # pyright: ignore
    # Of the first frame the left column is retained, which has two ids; of the second nothing.
    (fewer,) = compact_ids.renumber([table([0, 1, 2, 3, 4, 7, 10, 17])], 1)
    expected = [(0,) * 3, (1,) * 3, (2,) * 3, (3,) * 3, (4, 4, 4), (4, 5, 4), (6,) * 3, (7,) * 3]
    assert [tuple(one) for one in fewer.position_ids[0].tolist()] == expected and compact_ids.next.tolist() == [8]  # pyright: ignore
    # With a layer that retains everything both end at the same id.
    one, other = compact_ids.renumber([table([0, 1, 2, 3, 4, 7, 10, 17]), table(whole)], 1)
    moved = [*expected[:2], *(tuple(i + 4 for i in ids) for ids in expected[2:])]
    assert [tuple(x) for x in one.position_ids[0].tolist()] == moved
    assert [tuple(x) for x in other.position_ids[0].tolist()] == ids

"""A row is opened in the same way from its file and from its shard: every setting reaches the reader."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from clips import MEDIA, RABBIT
from data_prep.decoded_clips.folder import read_prepared
from data_prep.decoded_clips.format import PrepareSettings
from data_prep.decoded_clips.prepare import prepare
from data_prep.manifest import Row, read_manifest
from omnimem.media import Chunk
from omnimem.stream_settings import StreamSettings
from small_runs import write_manifest
from train.data import open_row

SETTINGS = StreamSettings(chunk_seconds=2.0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, Row]:
    """The same clip of 7.8 s as a file and prepared at two frames per second."""
    folder = tmp_path_factory.mktemp("rows")
    manifest = read_manifest(
        write_manifest(folder / "set.jsonl", [{"media": RABBIT.name, "question": "What?", "answer": "A rabbit."}]),
        MEDIA,
    )
    prepare(manifest, folder / "prepared", PrepareSettings(fps=2.0), workers=1)
    return {"file": manifest.rows[0], "prepared": read_prepared(folder / "prepared").rows[0]}


def chunks(row: Row, settings: StreamSettings, backbone) -> list[Chunk]:
    reader, _ = open_row(row, settings, backbone)
    return list(reader)


@pytest.mark.parametrize("kind", ["file", "prepared"])
@pytest.mark.parametrize(
    ("changes", "spans", "frames"),
    [
        ({}, [(0, 2), (2, 4), (4, 6), (6, 7.8)], 8),
        ({"max_seconds": 5.0}, [(0, 2), (2, 4), (4, 5)], 5),
        ({"chunk_seconds": 4.0}, [(0, 4), (4, 7.8)], 8),
        ({"fps": 2.0}, [(0, 2), (2, 4), (4, 6), (6, 7.8)], 16),
    ],
    ids=str,
)
def test_chunks_follow_the_settings(rows, tiny, kind, changes, spans, frames):
    found = chunks(rows[kind], replace(SETTINGS, **changes), tiny)
    assert [(one.t0, pytest.approx(one.t1)) for one in found] == spans
    assert sum(len(one.frames) for one in found) == frames
    assert all(one.audio is not None for one in found)
    for one, other in zip(found, chunks(rows["file"], replace(SETTINGS, **changes), tiny), strict=True):
        assert np.array_equal(one.frames, other.frames) and np.array_equal(one.audio, other.audio)


@pytest.mark.parametrize("kind", ["file", "prepared"])
def test_audio_is_read_only_if_row_and_settings_enable_it(rows, tiny, kind):
    for row_audio, wanted in ((True, True), (True, False), (False, True), (False, False)):
        row = replace(rows[kind], audio=row_audio)
        found = chunks(row, replace(SETTINGS, audio=wanted), tiny)
        assert {one.audio is not None for one in found} == {row_audio and wanted}

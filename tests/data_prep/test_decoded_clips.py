"""`omnimem data prepare`: shards give the same chunks as the clips, no clip is decoded twice, clips may be deleted.

python -m pytest tests/data_prep/test_decoded_clips.py
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import data_prep.decoded_clips.prepare as preparing
from clips import MEDIA, RABBIT, WEBB
from data_prep.decoded_clips.folder import PreparedRow, is_prepared, read_prepared
from data_prep.decoded_clips.format import PrepareSettings
from data_prep.decoded_clips.prepare import prepare
from data_prep.decoded_clips.shard_reader import ShardReader
from data_prep.decoded_clips.shard_writer import Prepared, RefusedClip, Task, group_lengths, prepare_clip
from data_prep.manifest import Manifest, manifest_fingerprint, read_manifest
from media_files import tone, write_media
from omnimem.cli import main as omnimem
from omnimem.errors import OmniMemError
from omnimem.files import LEFTOVER
from omnimem.media import MediaError, MediaReader, open_media
from omnimem.recipe import DataConfig, load_recipe
from small_runs import (
    FLOWER,
    HALF,
    ROOT,
    ROWS,
    arguments,
    environment,
    main,
    trained_run,
    weights_bytes,
    write_manifest,
)
from train.data import load_rows
from train.evaluation import held_out_rows

SPEECH = MEDIA / "audio_speech_commentary_mono16k_7s.mp3"
APOLLO = MEDIA / "speech_apollo15_hammer_feather_47s.webm"
ROTATED = MEDIA / "odd_rotated_no_audio_nasa.mp4"
CLIPS = [RABBIT, MEDIA / FLOWER, WEBB, SPEECH, ROTATED]


def made(clip: Path, folder: Path, audio_path: Path | None = None, **settings) -> Path:
    """The shard of a clip."""
    outcome = prepare_clip(Task(clip, audio_path, PrepareSettings(**settings), folder))
    assert isinstance(outcome, Prepared), outcome
    return folder / outcome.shard


def assert_same(found: ShardReader, expected: MediaReader, slack: float = 0.0) -> None:
    """Chunk for chunk and bit for bit; the last one may end later by less than `slack` seconds."""
    for a, b in zip(list(found), list(expected), strict=True):
        assert (a.index, a.t0, a.last) == (b.index, b.t0, b.last)
        assert a.t1 == b.t1 or (a.last and b.t1 < a.t1 < b.t1 + slack)
        for name in ("frames", "frame_times", "audio", "audio_before", "audio_after"):
            one, other = getattr(a, name), getattr(b, name)
            assert (one is None) == (other is None)
            assert one is None or (one.dtype == other.dtype and np.array_equal(one, other)), name


# ---- reading back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.stem[:16])
def test_chunks_equal_those_of_the_clip(clip, tmp_path):
    """At any chunk length, and at every rate that divides the stored one."""
    shard = made(clip, tmp_path, fps=2.0)
    for fps, seconds in ((2.0, 2.0), (2.0, 1.5), (1.0, 4.0), (0.5, 10.0)):
        asked = {"fps": fps, "chunk_seconds": seconds, "short_side": 360}
        assert_same(ShardReader(shard, **asked), open_media(clip, **asked))
    reader = ShardReader(shard, fps=1.0, short_side=360, name="clip")
    assert list(map(repr, reader)) == list(map(repr, reader))  # may be read again
    assert replace(reader.info, path=str(clip)) == open_media(clip).info


@pytest.mark.parametrize("frame_format", ["webp", "png"])
def test_the_exact_formats_are_exact(frame_format, tmp_path):
    shard = made(RABBIT, tmp_path, frame_format=frame_format, short_side=None)
    assert_same(ShardReader(shard), open_media(RABBIT))


def test_without_audio(tmp_path):
    """Prepared without audio, or read without it: the same chunks if video starts no later than audio."""
    asked = {"fps": 1.0, "chunk_seconds": 4.0, "short_side": 360, "audio": False}
    for clip in (RABBIT, WEBB):
        assert open_media(clip).info.video_offset == 0
        # The end of the video is not stored if audio is longer.
        assert_same(ShardReader(made(clip, tmp_path), **asked), open_media(clip, **asked), slack=1.0)
    assert_same(ShardReader(made(APOLLO, tmp_path, audio=False), **asked), open_media(APOLLO, **asked))
    with pytest.raises(MediaError, match="no video, and audio is off"):
        ShardReader(made(SPEECH, tmp_path), short_side=360, audio=False)


def test_separate_audio_file(tmp_path):
    asked = {"chunk_seconds": 4.0, "short_side": 360}
    shard = made(MEDIA / FLOWER, tmp_path, audio_path=SPEECH)
    assert_same(ShardReader(shard, **asked), open_media(MEDIA / FLOWER, audio_path=SPEECH, **asked))
    assert shard != made(MEDIA / FLOWER, tmp_path)


@pytest.mark.parametrize(("prepared", "read"), [(None, 4.0), (6.0, 6.0), (6.0, 3.3), (100.0, 100.0)])
def test_max_seconds(prepared, read, tmp_path):
    shard = made(RABBIT, tmp_path, max_seconds=prepared)
    for seconds in (2.0, 5.0):
        asked = {"chunk_seconds": seconds, "short_side": 360, "max_seconds": read}
        assert_same(ShardReader(shard, **asked), open_media(RABBIT, **asked))


def test_the_end_is_exact_wherever_it_falls(tmp_path):
    """A clip that ends right after the edge of a row group ends at the same time in chunks of other lengths."""
    length = next(iter(group_lengths(1.0)))
    clip = write_media(tmp_path / "edge.mkv", rate=1000, pts=[*range(int(length)), length - 0.0005], codec="ffv1")
    shard = made(clip, tmp_path)
    for seconds in (length, 3.0, 25.0):
        asked = {"chunk_seconds": seconds, "short_side": 360}
        assert_same(ShardReader(shard, **asked), open_media(clip, **asked))


def test_smaller_formats_come_close(tmp_path):
    exact = next(iter(open_media(RABBIT, chunk_seconds=4.0, short_side=360)))
    small = made(RABBIT, tmp_path, frame_format="jpeg", jpeg_quality=90, audio_dtype="int16")
    found = next(iter(ShardReader(small, chunk_seconds=4.0, short_side=360)))
    difference = np.abs(found.frames.astype(int) - exact.frames)
    assert 0 < difference.mean() < 3
    assert np.abs(found.audio - exact.audio).max() <= 0.5 / 32768 + 1e-7
    assert small.stat().st_size < 0.5 * made(RABBIT, tmp_path).stat().st_size
    # 16-bit audio that needs no resampling is exact.
    clip = write_media(tmp_path / "tone.wav", codec=None, audio_tracks=[{"samples": tone(3.0)}])
    assert_same(ShardReader(made(clip, tmp_path, audio_dtype="int16"), short_side=360), open_media(clip))


def test_settings_that_are_not_stored_are_refused_in_one_line(tmp_path):
    shard = made(RABBIT, tmp_path, fps=2.0, max_seconds=6.0, audio=False)
    with pytest.raises(OmniMemError) as caught:
        ShardReader(shard, name="clip.mp4", fps=3.0, short_side=240, audio=True)
    assert str(caught.value).startswith(
        "clip.mp4: prepared with fps=2.0, short_side=360, audio=off, max_seconds=6.0, but fps=3, short_side=240, "
        "audio=on, max_seconds=none is requested"
    )
    assert "omnimem data prepare MANIFEST --to DIR --fps 3 --short-side 240 --audio on" in str(caught.value)


def test_a_damaged_or_missing_shard_is_reported(tmp_path):
    shard = made(RABBIT, tmp_path)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    with pytest.raises(MediaError, match=r"clip.mp4: its shard .* is damaged .*prepare it again"):
        list(ShardReader(shard, name="clip.mp4", short_side=360))
    shard.write_bytes(content[:1000])
    with pytest.raises(MediaError, match="is damaged"):
        ShardReader(shard, short_side=360)
    shard.unlink()
    with pytest.raises(MediaError, match="is missing; prepare it again"):
        ShardReader(shard, short_side=360)


def test_shards_stream_through_datasets(tmp_path):
    from datasets import load_dataset

    made(RABBIT, tmp_path)
    rows = load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), split="train", streaming=True)
    row = next(iter(rows))
    chunk = next(iter(open_media(RABBIT, chunk_seconds=20.0, short_side=360)))
    assert np.array_equal(np.stack([np.asarray(image) for image in row["frames"]]), chunk.frames)
    assert np.array_equal(np.float32(row["audio"]), chunk.audio)


# ---- preparing -------------------------------------------------------------------------------------------------------


def manifest(folder: Path, *names: str) -> Manifest:
    rows = [{"media": name, "question": "What is seen?", "answer": "A clip."} for name in names]
    return read_manifest(write_manifest(folder / "data.jsonl", rows), MEDIA)


def test_no_clip_is_decoded_twice(tmp_path, monkeypatch):
    two = manifest(tmp_path, RABBIT.name, FLOWER)
    first = prepare(two, tmp_path / "a", PrepareSettings(), workers=1)
    assert (first.clips, first.decoded, first.problems) == (2, 2, [])
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a" / "clips").glob("*.parquet")}

    # Of a manifest with more rows, only new clips are decoded.
    grown = prepare(manifest(tmp_path, RABBIT.name, RABBIT.name, FLOWER, WEBB.name), tmp_path / "a", PrepareSettings())
    assert (grown.clips, grown.decoded) == (3, 1)
    # Another folder may share the shards, which are identified by content: a copy is the same clip.
    shutil.copy(RABBIT, tmp_path / "copy.mp4")
    other = read_manifest(write_manifest(tmp_path / "b.jsonl", [{**ROWS[0], "media": "copy.mp4"}]), tmp_path)
    shared = prepare(other, tmp_path / "b", PrepareSettings(), clips=tmp_path / "a" / "clips", workers=1)
    assert (shared.clips, shared.decoded) == (1, 0)
    assert len(read_prepared(tmp_path / "b").rows) == 1

    # A third time: no file is read.
    monkeypatch.setattr(preparing, "prepare_clip", None)
    assert prepare(two, tmp_path / "a", PrepareSettings(), workers=1).decoded == 0
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a" / "clips").glob("*.parquet")}
    assert before.items() <= after.items() and len(after) == 3


def test_other_settings_need_another_folder(tmp_path):
    rows = manifest(tmp_path, RABBIT.name)
    prepare(rows, tmp_path / "a", PrepareSettings(), workers=1)
    with pytest.raises(OmniMemError, match=r"prepared with fps=1.0 \(now 2.0\)"):
        prepare(rows, tmp_path / "a", PrepareSettings(fps=2.0), workers=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(OmniMemError, match="holds other files"):
        prepare(rows, tmp_path / "mine", PrepareSettings(), workers=1)


def test_a_damaged_clip_is_refused_and_the_others_are_prepared(tmp_path):
    rows = manifest(tmp_path, HALF, RABBIT.name)
    with pytest.raises(OmniMemError, match=r"^line 1: .*cut off.*--on-bad-row skip"):
        prepare(rows, tmp_path / "a", PrepareSettings(), workers=1)
    assert not is_prepared(tmp_path / "a") and len(list((tmp_path / "a" / "clips").glob("*.parquet"))) == 1
    report = prepare(rows, tmp_path / "a", PrepareSettings(), workers=1, on_bad_row="skip")
    assert (report.clips, report.decoded) == (1, 0) and "cut off" in report.problems[0]
    assert [row.name for row in read_prepared(tmp_path / "a").rows] == [RABBIT.name]
    with pytest.raises(OmniMemError, match="no clip could be prepared"):
        prepare(manifest(tmp_path, HALF), tmp_path / "b", PrepareSettings(), workers=1, on_bad_row="skip")


def test_worker_processes_write_the_same_shards(tmp_path):
    rows = manifest(tmp_path, RABBIT.name, FLOWER, HALF)
    told: list[Prepared | RefusedClip] = []
    for folder, workers in (("one", 1), ("two", 2)):
        prepare(rows, tmp_path / folder, PrepareSettings(), workers=workers, on_bad_row="skip", on_clip=told.append)
    assert len(told) == 6 and sum(isinstance(one, RefusedClip) for one in told) == 2
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / f / "clips").glob("*.parquet")} for f in ("one", "two"))
    assert one == two and len(one) == 2
    assert (tmp_path / "one" / "rows.jsonl").read_bytes() == (tmp_path / "two" / "rows.jsonl").read_bytes()


def test_a_clip_whose_process_dies_is_refused_by_name(tmp_path, monkeypatch):
    """The pool itself is tested in test_validate.py."""

    def dies(function, tasks, workers):
        yield from ((task, None if task.media == RABBIT else function(task)) for task in tasks)

    monkeypatch.setitem(preparing.EXECUTORS, "process", dies)
    rows = manifest(tmp_path, FLOWER, RABBIT.name)
    report = prepare(rows, tmp_path / "a", PrepareSettings(), on_bad_row="skip")
    assert (report.clips, report.decoded) == (1, 1)
    assert report.problems[0].startswith(f"line 2: {RABBIT.name}: the worker process that decoded it died")
    monkeypatch.undo()
    assert prepare(rows, tmp_path / "a", PrepareSettings(), workers=1).decoded == 1


def test_a_killed_run_resumes(tmp_path):
    """Killed while decoding the second clip: the first shard is complete, temporary files are removed."""
    names = [RABBIT.name, "speech_burned_in_timecode_42s.mp4"]
    write_manifest(tmp_path / "data.jsonl", [{**ROWS[0], "media": name} for name in names])
    command = ["data", "prepare", str(tmp_path / "data.jsonl"), "--root", str(MEDIA), "--fps", "10"]
    command += ["--to", str(tmp_path / "a"), "--workers", "1"]
    clips = tmp_path / "a" / "clips"
    run = subprocess.Popen([sys.executable, "-m", "omnimem", *command], cwd=ROOT, env=environment())

    def at_work() -> bool:
        unfinished = [path for path in clips.glob(".*") if LEFTOVER.fullmatch(path.name)]
        return bool(list(clips.glob("[!.]*.parquet"))) and any(path.stat().st_size for path in unfinished)

    deadline = time.monotonic() + 30
    while not at_work() and time.monotonic() < deadline:
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not is_prepared(tmp_path / "a") and len(list(clips.glob("[!.]*.parquet"))) == 1
    assert any(LEFTOVER.fullmatch(path.name) for path in clips.glob(".*"))
    report = prepare(manifest(tmp_path, *names), tmp_path / "a", PrepareSettings(fps=10.0), workers=1)
    assert (report.clips, report.decoded) == (2, 1)
    assert not any(LEFTOVER.fullmatch(path.name) for path in clips.glob(".*"))


# ---- on the command line ---------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    write_manifest(tmp_path / "data.jsonl")
    command = ["data", "prepare", str(tmp_path / "data.jsonl"), "--to", str(tmp_path / "a"), "--root", str(MEDIA)]
    command += ["--workers", "1", "--short-side", "none", "--frame-format", "jpeg", "--jpeg-quality", "80"]
    assert omnimem(command) == 0
    assert "2 clips (2 decoded now, 0 reused)" in capsys.readouterr().out
    known = json.loads((tmp_path / "a" / "prepared.json").read_text())["settings"]
    assert (known["short_side"], known["frame_format"], known["jpeg_quality"], known["fps"]) == (None, "jpeg", 80, 1.0)


def test_settings_of_a_recipe(tmp_path, capsys):
    given, *others = arguments(tmp_path, "data.fps=2")
    words = ["--recipe", given.removeprefix("recipe="), *others]
    assert (
        omnimem(["data", "prepare", "--to", str(tmp_path / "a"), "--workers", "1", "--max-seconds", "3", *words]) == 0
    )
    known = json.loads((tmp_path / "a" / "prepared.json").read_text())["settings"]
    assert (known["fps"], known["max_seconds"], known["short_side"]) == (2.0, 3.0, 360)
    assert omnimem(["data", "prepare", "--to", str(tmp_path / "b")]) == 2
    assert "no manifest given" in capsys.readouterr().err


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The two clips of the small runs, prepared; the original files are deleted."""
    base = tmp_path_factory.mktemp("prepared")
    shutil.copytree(MEDIA, base / "media", ignore=lambda _, names: {n for n in names if n not in (FLOWER, RABBIT.name)})
    rows = read_manifest(write_manifest(base / "data.jsonl"), base / "media")
    fingerprint = manifest_fingerprint(rows.rows)
    prepare(rows, base / "prepared", PrepareSettings(fps=2.0), workers=1)
    (base / "fingerprint").write_text(fingerprint)
    shutil.rmtree(base / "media")
    return base / "prepared"


def test_training_is_the_same(folder, tmp_path):
    overrides = ("train.max_steps=2", "data.chunk_seconds=4", "eval.eval_steps=2")
    clips = trained_run(tmp_path, *overrides, f"eval.path={tmp_path / 'data.jsonl'}", f"eval.root={MEDIA}", out="clips")
    prepared = trained_run(tmp_path, *overrides, f"data.path={folder}", "data.root=null", f"eval.path={folder}")
    assert weights_bytes(clips) == weights_bytes(prepared)
    losses = [
        [json.loads(line)["eval_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()[-1:]]
        for run in (clips, prepared)
    ]
    assert losses[0] == losses[1]


def test_the_fingerprint_is_that_of_the_manifest(folder):
    """A run that started on the clips can be resumed on the prepared folder."""
    rows = load_rows(DataConfig(path=str(folder), fps=2.0)).rows
    assert manifest_fingerprint(rows) == (folder.parent / "fingerprint").read_text()


def test_the_plan_is_the_same(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    plans = []
    for place in ([], [f"data.path={folder}", "data.root=null"]):
        assert main(arguments(tmp_path, "dry_run=true", *place)) == 0
        plans.append(capsys.readouterr().out.split("\n", 1)[1])
    assert plans[0] == plans[1] and RABBIT.name in plans[0]


def test_no_clip_is_opened_at_the_start(folder, monkeypatch):
    for opened in ("data_prep.clip_info.open_media", "data_prep.decoded_clips.shard_reader.read_footer"):
        monkeypatch.setattr(opened, None)
    rows = load_rows(DataConfig(path=str(folder), fps=2.0)).rows
    assert [row.name for row in rows] == [row["media"] for row in ROWS]
    assert all(isinstance(row, PreparedRow) for row in rows)


def test_a_recipe_with_other_settings_is_refused(folder, tmp_path):
    with pytest.raises(OmniMemError, match=rf"^data.path={folder}: prepared with fps=2.0, but fps=3 is requested"):
        load_rows(DataConfig(path=str(folder), fps=3.0))
    recipe = load_recipe(arguments(tmp_path, f"eval.path={folder}", "data.short_side=240"))
    with pytest.raises(OmniMemError, match="prepared with short_side=360"):
        held_out_rows(recipe)
    load_rows(DataConfig(path=str(folder), fps=1.0))
    copy = shutil.copytree(folder, tmp_path / "copy")
    known = json.loads((copy / "prepared.json").read_text())
    known["settings"]["audio"] = False
    (copy / "prepared.json").write_text(json.dumps(known))
    with pytest.raises(OmniMemError, match="prepared with audio=off, but audio=on"):
        load_rows(DataConfig(path=str(copy), fps=2.0))
    load_rows(DataConfig(path=str(copy), fps=2.0), supports_audio=False)


def test_a_missing_shard_is_found_at_the_start(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    first = load_rows(DataConfig(path=str(copy))).rows[0]
    first.media.unlink()
    with pytest.raises(OmniMemError, match=rf"{copy}:1: {first.name}: its shard .* is missing"):
        load_rows(DataConfig(path=str(copy)))
    kept = load_rows(DataConfig(path=str(copy), on_bad_row="skip"))
    assert len(kept.rows) == len(ROWS) - 1 and len(kept.problems) == 1


def test_a_truncated_copy_is_found_at_the_start_and_repaired(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    first = load_rows(DataConfig(path=str(copy))).rows[0]
    content = first.media.read_bytes()
    first.media.write_bytes(content[:-1000])
    with pytest.raises(OmniMemError, match=rf"{first.name}: its shard .* is missing or truncated; prepare again"):
        load_rows(DataConfig(path=str(copy)))
    rows = read_manifest(write_manifest(tmp_path / "data.jsonl"), MEDIA)
    assert prepare(rows, copy, PrepareSettings(fps=2.0), workers=1).decoded == 1
    assert first.media.read_bytes() == content
    listed = (copy / "rows.jsonl").read_text()
    (copy / "rows.jsonl").write_text(listed[:-100])
    with pytest.raises(OmniMemError, match="cannot be read"):
        load_rows(DataConfig(path=str(copy)))
    assert prepare(rows, copy, PrepareSettings(fps=2.0), workers=1).decoded == 0
    assert (copy / "rows.jsonl").read_text() == listed


def test_a_folder_of_another_version_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    known = json.loads((copy / "prepared.json").read_text())
    (copy / "prepared.json").write_text(json.dumps({**known, "version": 99}))
    with pytest.raises(OmniMemError, match="prepared in format 99; this version reads 2"):
        load_rows(DataConfig(path=str(copy)))
    (copy / "prepared.json").write_text("{")
    with pytest.raises(OmniMemError, match="not written by `omnimem data prepare`"):
        load_rows(DataConfig(path=str(copy)))


# ---- Ray -------------------------------------------------------------------------------------------------------------


def test_missing_ray_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OmniMemError, match=r"pip install 'omnimem\[ray\]'"):
        prepare(manifest(tmp_path, RABBIT.name), tmp_path / "a", PrepareSettings(), executor="ray")


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_a_ray_cluster_that_does_not_answer_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(OmniMemError, match=r"no Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:9"):
        prepare(manifest(tmp_path, RABBIT.name), tmp_path / "a", PrepareSettings(), executor="ray")


@pytest.mark.long
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.parametrize("running", [False, True], ids=["started here", "found"])
def test_a_ray_cluster_writes_the_same_shards(running, tmp_path, monkeypatch, caplog):
    """On a running cluster, and on one started by the command."""
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    rows = manifest(tmp_path, RABBIT.name, FLOWER, HALF)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2}) if running else None
    try:
        if cluster is not None:
            monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        with caplog.at_level(logging.INFO, logger="omnimem.data"):
            report = prepare(rows, tmp_path / "ray", PrepareSettings(), executor="ray", workers=2, on_bad_row="skip")
    finally:
        if cluster is not None:
            cluster.shutdown()
    assert ("on the Ray cluster at" if running else "starting a local one") in caplog.text
    assert (report.clips, report.decoded, len(report.problems)) == (2, 2, 1)
    prepare(rows, tmp_path / "one", PrepareSettings(), workers=1, on_bad_row="skip")
    for file in (tmp_path / "one" / "clips").glob("*.parquet"):
        assert (tmp_path / "ray" / "clips" / file.name).read_bytes() == file.read_bytes()

"""`omnimem bench`: the stream has the requested length, measured values are exact, finished cells are reused."""

from __future__ import annotations

import csv
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from clips import RABBIT, WEBB
from omnimem.budget import BudgetProfile
from omnimem.cli import main
from omnimem.errors import OmniMemError
from omnimem.measure.bench import measure_cell
from omnimem.measure.meter import Meter, repeat
from omnimem.media import open_media
from omnimem.stream import StreamingSession
from omnimem.stream_settings import StreamSettings

BUDGET = 24


def task(method: str, seconds: float, **other) -> dict:
    """Options of a cell, as the command passes them."""
    about = {"media": str(WEBB), "mean_budget": BUDGET, "ratio": 5.0, "rounds": 1, "stream": {"chunk_seconds": 4.0}}
    return {**about, "method": method, "options": {}, "seconds": seconds, **other}


def bench(model: Path | str, out: Path, *options: str) -> int:
    common = ["--mean-budget", str(BUDGET), "--rounds", "1", "--device", "cpu"]
    return main(["bench", "--model", str(model), "--out", str(out), *common, *options])


def session(backbone) -> StreamingSession:
    return StreamingSession(
        backbone, BudgetProfile.uniform(backbone.config, BUDGET), "omnimem", StreamSettings(chunk_seconds=4)
    )


def test_the_repeated_clip_has_increasing_times():
    reader = open_media(RABBIT, chunk_seconds=2, short_side=112)
    whole = list(reader)[:3]  # of 7.8 s
    chunks = list(repeat(reader, 1.0, 2.0, 15.0))
    assert len(chunks) == 8
    assert [chunk.index for chunk in chunks] == list(range(8)) and [c.last for c in chunks] == [False] * 7 + [True]
    for number, chunk in enumerate(chunks):
        assert (chunk.t0, chunk.t1) == (2.0 * number, 2.0 * number + 2)
        np.testing.assert_array_equal(chunk.frames, whole[number % 3].frames)
        np.testing.assert_array_equal(chunk.frame_times, [2.0 * number, 2.0 * number + 1])
    with pytest.raises(OmniMemError, match="shorter than a chunk of 10 s"):
        list(repeat(open_media(RABBIT, chunk_seconds=10), 1.0, 10.0, 30.0))


def test_a_stream_that_is_not_repeated_is_the_clip(tiny):
    """A meter changes nothing: same events and answer, and each chunk but the first is timed."""
    plain = session(tiny)
    expected = list(plain.watch(WEBB))
    with Meter(session(tiny)) as meter:
        assert list(meter.watch(WEBB)) == expected
        answer, seconds = meter.ask("What is seen?", 4)
    assert answer == plain.ask("What is seen?", max_new_tokens=4) and seconds > 0
    assert len(meter.step_seconds) == len(expected) - 1 and min(meter.step_seconds) > 0
    assert not tiny.language_model._forward_hooks
    # Retained tokens and the largest chunk, before compression.
    per_token = expected[0].kv_bytes / sum(expected[0].retained.values())
    chunk = max(old.kv_bytes + new.new_tokens * per_token for old, new in pairwise(expected))
    assert chunk <= meter.kv_peak < 1.2 * chunk


def test_bounded_caches_stay_and_full_grows(tiny):
    short, long = (
        {name: measure_cell(task(name, seconds), tiny) for name in ("full", "omnimem", "h2o")} for seconds in (24, 48)
    )
    for name in ("omnimem", "h2o"):
        assert short[name]["answer_bytes"] == long[name]["answer_bytes"] < short["full"]["answer_bytes"]
        assert short[name]["peak_bytes"] == long[name]["peak_bytes"]
        assert short[name]["memory_peak_bytes"] >= short[name]["peak_bytes"] > short[name]["answer_bytes"]
    growth = {long["full"][key] - short["full"][key] for key in ("answer_bytes", "peak_bytes")}
    # 24 s are six chunks of 100 audio tokens and 2 frames of at least 4 tokens, 256 bytes each in 3 layers.
    assert len(growth) == 1 and growth.pop() >= 6 * 108 * 3 * 256
    for row in (*short.values(), *long.values()):
        assert row["first_token_ms"] > 0 and row["compute_ratio"] > 0 and row["device_peak_bytes"] is None
    assert [row["seconds"] for row in (short["full"], long["full"])] == [24, 48]


@pytest.mark.long
def test_the_command_from_clip_to_figure_and_again(tiny_path, tmp_path, capsys):
    options = ["--media", str(WEBB), "--methods", "full,uniform", "--lengths", "16", "--chunk-seconds", "4"]
    assert bench(tiny_path, tmp_path, *options) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert [(row["method"], row["seconds"]) for row in rows] == [("full", 16), ("uniform", 16)]
    assert rows[0]["peak_bytes"] > rows[1]["peak_bytes"] and rows[0]["resident_bytes"] >= 0
    assert [line.split()[0] for line in printed.splitlines()[1:3]] == ["uniform", "full"]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for row, line in zip(rows, lines, strict=True):
        assert json.loads((tmp_path / row["file"]).read_text())["result"].items() <= row.items()
        assert int(line["answer_bytes"]) == row["answer_bytes"]
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert bench(tiny_path, tmp_path, *options) == 0
    assert capsys.readouterr().out == printed
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == before


@pytest.mark.long
def test_a_model_retrained_in_the_same_folder_is_measured_again(tiny_path, tmp_path):
    model, out = tmp_path / "model", tmp_path / "bench"
    shutil.copytree(tiny_path, model)
    options = ["--media", str(WEBB), "--methods", "uniform", "--lengths", "8", "--chunk-seconds", "4"]
    assert bench(model, out, *options) == 0
    (first,) = (out / "cells").iterdir()
    weights = load_file(model / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    assert bench(model, out, *options) == 0
    (row,) = json.loads((out / "results.json").read_text())["cells"]
    assert len([*(out / "cells").iterdir()]) == 2 and row["file"] != f"cells/{first.name}"
    # The same weights in another folder are the same model.
    moved = model.rename(tmp_path / "moved")
    assert bench(moved, out, *options) == 0
    assert len([*(out / "cells").iterdir()]) == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--methods", "hermez"], "did you mean 'hermes'?"),
        (["--media", "nosuch.mp4"], "nosuch.mp4: no such file"),
        (["--device", "nosuch"], "cannot be used here"),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line_before_anything_runs(tmp_path, capsys, options, reason):
    assert bench("tiny", tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


@pytest.mark.long
def test_an_error_in_the_process_of_a_cell_is_one_line(tiny_path, tmp_path, capsys):
    options = ["--media", str(WEBB), "--methods", "uniform", "--lengths", "4", "--chunk-seconds", "4"]
    assert bench(tiny_path, tmp_path, *options) == 2
    assert "4 s is not longer than a chunk of 4 s" in capsys.readouterr().err

"""Trackers receive the metrics of `metrics.jsonl`, and a resumed run continues its tracked run (offline)."""

from __future__ import annotations

import json
import sqlite3
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from small_runs import arguments, main, metrics, trained_run
from train.trackers import TRACKERS_FILE


def identity(run: Path, library: str) -> dict[str, Any]:
    return json.loads((run / TRACKERS_FILE).read_text())[library]


def records_in(path: Path) -> Iterator[Any]:
    """Records of a wandb file: the log format of LevelDB in blocks of 32 KiB, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # complete, or the last part
            yield Record.FromString(whole)
            whole = b""


def records_of_wandb(folder: Path) -> list[tuple[Any, list[dict[str, Any]]]]:
    """Content of offline runs, oldest first: the run, and the values of every step."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        run, steps = None, []
        for record in records_in(path):
            if record.HasField("run"):
                run = record.run
            if record.HasField("history"):
                items = record.history.item
                steps.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        found.append((run, steps))
    return found


@pytest.mark.long
def test_wandb_has_one_run_however_often_it_is_resumed(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracked = ("train.report_to=[wandb]", "train.project=streams", "train.run_name=first try")
    run = trained_run(tmp_path, *tracked, "train.max_steps=2")
    trained_run(tmp_path, *tracked, "train.max_steps=3")
    (one, logged), (again, more) = records_of_wandb(tmp_path)
    assert one.project == again.project == "streams" and one.display_name == again.display_name == "first try"
    assert one.run_id == again.run_id == identity(run, "wandb")["id"]
    for values, record in zip([*logged, *more], metrics(run), strict=True):
        assert values["_step"] == record["step"] and values["train/loss"] == record["loss"]
        assert values["train/retained/visual"] == record["retained"]["visual"]
    trained_run(tmp_path, "train.report_to=[wandb]", "train.max_steps=1", out="other")
    (other, _) = records_of_wandb(tmp_path)[-1]
    assert other.run_id != one.run_id and (other.project, other.display_name) == ("omnimem", "other")


@pytest.mark.long
def test_trackio_has_one_run_however_often_it_is_resumed(tmp_path, monkeypatch):
    """A run in another folder is another tracked run, even with the same name."""
    assert "trackio" not in sys.modules, "it looks at its folder when it is imported"
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    for out, steps in (("a/run", 2), ("a/run", 3), ("b/run", 1)):
        trained_run(tmp_path, "train.report_to=[trackio]", f"train.max_steps={steps}", out=out)
    (file,) = (tmp_path / "trackio").glob("omnimem*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY rowid").fetchall()
    first, second = (identity(tmp_path / out, "trackio")["id"] for out in ("a/run", "b/run"))
    logged = {run: [(step, json.loads(values)) for i, _, step, values in rows if i == run] for run in (first, second)}
    assert {name for _, name, _, _ in rows} == {"run"} and len(rows) == 4
    assert [step for step, _ in logged[first]] == [1, 2, 3] and [step for step, _ in logged[second]] == [1]
    for (_, values), record in zip(logged[first], metrics(tmp_path / "a" / "run"), strict=True):
        assert values["train/loss"] == record["loss"]
        assert values["train/retained/visual"] == record["retained"]["visual"]


@pytest.mark.parametrize(
    "override", ["train.project=streams", pytest.param("train.run_name=other", marks=pytest.mark.long)]
)
def test_a_run_keeps_project_and_name(tmp_path, capsys, override):
    trained_run(tmp_path, "train.max_steps=1")
    assert main(arguments(tmp_path, override)) == 2
    assert override.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "words"),
    [("[mlflow]", "train.report_to must be a list of: wandb, trackio"), ("[wandb]", "wandb is not installed")],
)
def test_an_unknown_or_missing_tracker_is_one_line(tmp_path, capsys, monkeypatch, value, words):
    monkeypatch.setattr("train.setup.find_spec", lambda name: None)
    assert main(arguments(tmp_path, f"train.report_to={value}")) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1

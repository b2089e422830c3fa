"""Trackers are given what `metrics.jsonl` holds; the real libraries, offline, where they are installed."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from small_runs import arguments, main, metrics, start, trained_run


class Tracker(ModuleType):
    """The three functions that wandb and trackio share, written down."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.calls: list[tuple] = []

    def init(self, **settings):
        self.calls.append(("init", settings))

    def log(self, values, step):
        self.calls.append(("log", values, step))

    def finish(self):
        self.calls.append(("finish",))


def test_every_record_reaches_a_tracker_once(tmp_path, monkeypatch):
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    monkeypatch.setattr("train.setup.find_spec", lambda name: name == "trackio")
    run = trained_run(tmp_path, "train.trackers=[trackio]", "train.max_steps=3")
    (first, settings), *logged, last = tracker.calls
    assert first == "init" and settings["name"] == run.name and settings["config"]["train"]["max_steps"] == 3
    assert last == ("finish",)
    assert [step for _, _, step in logged] == [1, 2, 3]
    for (_, values, _), record in zip(logged, metrics(run), strict=True):
        assert values["train/loss"] == record["loss"]
        assert values["train/retained/visual"] == record["retained"]["visual"]


@pytest.mark.slow
def test_wandb_takes_it_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    trained_run(tmp_path, "train.trackers=[wandb]", "train.max_steps=2")
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_trackio_takes_it(tmp_path):
    pytest.importorskip("trackio")
    args = arguments(tmp_path, "train.trackers=[trackio]", "train.max_steps=2")
    done = start("train.py", *args, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "trackio").glob("*.db"))


@pytest.mark.parametrize(
    ("value", "words"),
    [("[mlflow]", "train.trackers must be some of wandb, trackio"), ("[wandb]", "wandb is not installed")],
)
def test_an_unknown_or_missing_tracker_is_one_line(tmp_path, capsys, monkeypatch, value, words):
    monkeypatch.setattr("train.setup.find_spec", lambda name: None)
    assert main(arguments(tmp_path, f"train.trackers={value}")) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1

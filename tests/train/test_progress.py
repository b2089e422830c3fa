"""Progress in a log file and on a terminal; TensorBoard."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import sys
import termios

import pytest

import train.metrics
from omnimem.recipe import load_recipe
from small_runs import (
    AUDIO,
    VISUAL,
    arguments,
    metrics,
    trained_run,
)


def test_a_log_file_gets_a_line_every_few_steps(tmp_path, capsys, caplog):
    with caplog.at_level("INFO", "omnimem.train"):
        run = trained_run(
            tmp_path, "train.max_steps=5", "train.logging_steps=2", "train.learning_rate=3e-4", "train.min_lr_rate=1"
        )
    assert "\r" not in capsys.readouterr().err
    shown = [message for message in caplog.messages if message.startswith("step ")]
    records = {record["step"]: record for record in metrics(run)}
    assert list(records) == [2, 4, 5]
    for line, (step, record) in zip(shown, records.items(), strict=True):
        learned = f"step {step}/5 loss {record['loss']:.3f} lr 3.0e-04 retained {VISUAL}v+{AUDIO}a"
        spent = f"{record['tokens_per_second']:.0f} tokens/s {record['peak_gib']:.2f} GiB"
        assert re.fullmatch(rf"{re.escape(f'{learned} {spent}')} eta 0:0\d:\d\d", line), line
    assert shown[-1].endswith("eta 0:00:00")


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch, caplog):
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    recipe = load_recipe(arguments(tmp_path))
    record = {"step": 2, "loss": None, "learning_rate": 1e-3, "retained": {"visual": 80.0, "audio": 16.0}}
    with os.fdopen(writer, "w") as terminal, caplog.at_level("INFO", "omnimem.train"):
        monkeypatch.setattr(sys, "stderr", terminal)
        shown = train.metrics.Metrics(tmp_path, 1, 3, True, recipe)
        shown.progress({**record, "tokens_per_second": 1234.0, "peak_gib": 0.91})
        shown.close()
        text = os.read(reader, 100_000).decode()
    os.close(reader)
    assert "\rtrain:  67%| 2/3 [" in text
    assert "loss not finite lr 1.0e-03 retained 80v+16a 1234 tokens/s 0.91 GiB]" in text
    assert not caplog.messages


def test_tensorboard_shows_the_metrics_when_installed(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(trained.run / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "train/retained/visual"} <= set(
        events.Tags()["scalars"]
    )
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(record["step"], pytest.approx(record["loss"], rel=1e-6)) for record in metrics(trained.run)]


def test_nothing_breaks_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setattr(train.metrics, "find_spec", lambda name: None)
    run = trained_run(tmp_path, "train.max_steps=1")
    assert len(metrics(run)) == 1 and not (run / "tensorboard").exists()

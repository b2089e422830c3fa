"""Signals that end a run: the current step is saved, whatever handlers the shell had set."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from small_runs import ROOT, arguments, environment
from train.checkpoint import checkpoints


def ignore_interrupts() -> None:
    """As a shell without job control starts background commands."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.long
@pytest.mark.parametrize(
    ("wrapper", "signals"),
    [
        pytest.param((), [signal.SIGINT], id="SIGINT"),
        pytest.param(("nohup",), [signal.SIGHUP, signal.SIGTERM], id="nohup SIGTERM", marks=pytest.mark.long),
    ],
)
def test_a_background_run_saves_the_current_step(tmp_path, wrapper, signals):
    run = tmp_path / "run"
    command = [
        *wrapper,
        sys.executable,
        "train.py",
        *arguments(tmp_path, "train.max_steps=1000", "train.save_steps=999"),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), preexec_fn=ignore_interrupts, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        for number, step in zip(signals, (2, 4), strict=False):
            deadline = time.monotonic() + 90
            while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_bytes().count(b"\n") < step:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(number)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 1, error
    (stopped,) = re.findall(r"stopped after step (\d+), which is saved", error)
    assert [path.name for path in checkpoints(run)] == [f"step-{int(stopped):08d}"]
    assert not (run / "run.lock").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("before", [ignore_interrupts, None], ids=["background", "foreground"])
def test_a_second_signal_ends_the_run_at_once(number, before):
    code = f"""
import os
from train.stop import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), {number:d})
    assert stop.requested
    os.kill(os.getpid(), {number:d})
    print("went on")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          preexec_fn=before, capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stdout) == (-number, ""), done.stderr
    assert "a second signal stops at once" in done.stderr

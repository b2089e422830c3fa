"""One run at a time in an output folder: the lock, refusals, and locks of dead processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import train.lock
from omnimem.errors import OmniMemError
from small_runs import ROOT, arguments, configured, environment, lines, main, metrics, start
from train.checkpoint import EVICTED_FOLDER
from train.lock import LOCK_FILE, Owner, hold_lock


def logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while logged(run) < step:
        assert process.poll() is None, "the first run ended"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.long
def test_two_runs_at_once_and_one_after_a_kill(tmp_path):
    """The second run names the first and changes nothing; when the first is killed, its folder is free."""
    args, run = arguments(tmp_path, "train.offload=disk", "train.save_steps=1"), tmp_path / "run"
    first = subprocess.Popen(
        [sys.executable, "train.py", *args, "train.max_steps=1000"],
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for_step(first, run, 2)
        second = start("train.py", *args, "train.max_steps=1000")
        assert second.returncode == 2
        (line,) = lines(second.stderr)
        assert line.startswith(f"train: {run} is in use by a run on {os.uname().nodename}, process {first.pid}, since ")
        wait_for_step(first, run, logged(run) + 3)
        assert (run / EVICTED_FOLDER).is_dir()
    finally:
        first.kill()
    # Not waited for yet: a killed process that its parent has not looked at is still in the process table.
    done = logged(run)
    assert main([*args, f"train.max_steps={done + 2}"]) == 0
    first.wait()
    assert [record["step"] for record in metrics(run)] == list(range(1, done + 3))
    assert not (run / LOCK_FILE).exists()


def write(folder: Path, owner: Owner | None, beat: float | None = None) -> Path:
    """A lock file that its owner last updated at `beat`."""
    path = folder / LOCK_FILE
    path.write_text("" if owner is None else json.dumps(asdict(owner)))
    if beat is not None:
        os.utime(path, (beat, beat))
    return path


HERE = Owner.current()
ELSEWHERE = replace(HERE, host="node17", pid=4711)


def test_the_lock_names_its_process_while_it_is_held(tmp_path):
    with hold_lock(tmp_path / "run"):
        holder = Owner(**json.loads((tmp_path / "run" / LOCK_FILE).read_text()))
        assert (holder.host, holder.pid) == (os.uname().nodename, os.getpid()) and holder.is_running()
        with pytest.raises(OmniMemError, match=f"process {os.getpid()}, since "), hold_lock(tmp_path / "run"):
            pytest.fail("held twice")
        assert (tmp_path / "run" / LOCK_FILE).is_file(), "the one who was refused leaves the lock alone"
    assert not (tmp_path / "run" / LOCK_FILE).exists()
    with pytest.raises(KeyboardInterrupt), hold_lock(tmp_path / "run"):
        raise KeyboardInterrupt
    assert not (tmp_path / "run" / LOCK_FILE).exists()


@pytest.mark.parametrize(
    "holder",
    [replace(HERE, started=HERE.started - 60), replace(HERE, pid=2**22 + 1), None],
    ids=["another process of that id", "no process", "half a file"],
)
def test_the_lock_of_a_dead_process_is_taken_over_silently(tmp_path, holder, caplog):
    path = write(tmp_path, holder)
    with hold_lock(tmp_path):
        assert Owner(**json.loads(path.read_text())).started == pytest.approx(HERE.started, abs=1.5)
    assert not path.exists() and not caplog.messages


@pytest.mark.parametrize("holder", [ELSEWHERE, replace(HERE, pid_namespace="pid:[1]")], ids=["machine", "container"])
def test_a_run_on_another_machine_is_detected_by_its_heartbeat(tmp_path, holder, caplog):
    """Its process id has no meaning here, even if a process of this machine has the same."""
    path, ended = write(tmp_path, holder), threading.Event()

    def beat():
        while not ended.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    before = path.read_bytes()
    try:
        with pytest.raises(OmniMemError) as caught, hold_lock(tmp_path):
            pytest.fail("held twice")
    finally:
        ended.set()
        thread.join()
    line = str(caught.value)
    assert f"on {holder.host}, process {holder.pid}, since {holder.since}" in line and f"delete {path}" in line
    assert path.read_bytes() == before
    (told,) = caplog.messages
    assert "waiting up to" in told


@pytest.mark.parametrize("age", [0, 1e6], ids=["just", "long ago"])
def test_a_run_on_another_machine_without_a_heartbeat_is_dead(tmp_path, monkeypatch, caplog, age):
    """For example when a job is requeued on another node; also when the clocks of the two differ."""
    monkeypatch.setattr(train.lock, "SILENCE_SECONDS", 1.5)
    path = write(tmp_path, ELSEWHERE, time.time() + 3600 if age == 0 else time.time() - age)
    with hold_lock(tmp_path):
        assert Owner(**json.loads(path.read_text())).host == HERE.host
    assert len(caplog.messages) == (age == 0)


def test_the_owner_updates_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(train.lock, "HEARTBEAT_SECONDS", 0.02)
    with hold_lock(tmp_path):
        for _ in range(2):
            os.utime(tmp_path / LOCK_FILE, (0, 0))
            deadline = time.monotonic() + 10
            while (tmp_path / LOCK_FILE).stat().st_mtime == 0:
                assert time.monotonic() < deadline
                time.sleep(0.01)


def test_a_lock_that_was_taken_over_is_not_deleted(tmp_path):
    with hold_lock(tmp_path):
        write(tmp_path, ELSEWHERE)
    assert (tmp_path / LOCK_FILE).is_file()


def contend(folder: Path, ready, done, results) -> None:
    ready.wait()
    try:
        with hold_lock(folder):
            results.put("held")
            done.wait()
    except OmniMemError:
        results.put("refused")
        done.wait()


@pytest.mark.parametrize("dead", [False, True], ids=["new", "taken over"])
def test_of_many_processes_that_start_together_one_gets_the_lock(tmp_path, dead):
    """Check and write are atomic, also when all of them find the lock of a dead process."""
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if dead:
            write(folder, replace(HERE, started=HERE.started - 60))
        ready, done, results = context.Barrier(6), context.Barrier(6), context.Queue()
        many = [context.Process(target=contend, args=(folder, ready, done, results)) for _ in range(6)]
        for one in many:
            one.start()
        found = [results.get(timeout=30) for _ in many]
        for one in many:
            one.join()
        assert sorted(found) == ["held"] + ["refused"] * 5


def test_a_folder_that_cannot_be_created_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OmniMemError, match=r"output_dir .*file/run: Not a directory"), hold_lock(tmp_path / "file/run"):
        pytest.fail("held")


@pytest.mark.long
def test_only_the_main_process_of_two_reports_that_the_lock_is_held(tmp_path):
    with hold_lock(tmp_path / "run"):
        done = configured("multi_gpu", *arguments(tmp_path))
    assert done.returncode == 1, "the launcher's status of every failure"
    assert len([line for line in lines(done.stderr) if line.startswith("train")]) == 1, done.stderr
    assert f"train: {tmp_path / 'run'} is in use by a run on" in done.stderr
    assert not (tmp_path / "run" / "recipe.yaml").exists()

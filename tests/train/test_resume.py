"""After kill -9 at any moment the same command gives the same adapter, bit for bit, and logs every step once."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from small_runs import ROOT, arguments, environment, lines, main, metrics, start, trained_run, weights_bytes
from train.checkpoint import checkpoints

STEPS = 6
FILES = ("adapter_model.safetensors", "optimizer.safetensors", "rng-0.safetensors", "state.json")
SETTINGS = (f"train.max_steps={STEPS}", "train.save_steps=2", "lora.lora_dropout=0.2")
"""With dropout, so that the random state must be restored as well."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A run without interruption."""
    return trained_run(tmp_path_factory.mktemp("reference"), *SETTINGS)


def assert_equal(run: Path, reference: Path) -> None:
    assert weights_bytes(run) == weights_bytes(reference)
    records, expected = metrics(run), metrics(reference)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for name in ("loss", "learning_rate", "grad_norm", "tokens", "retained"):
        assert [record[name] for record in records] == [record[name] for record in expected]
    newest, expected_newest = checkpoints(run)[-1], checkpoints(reference)[-1]
    assert newest.name == expected_newest.name
    for file in FILES:
        assert (newest / file).read_bytes() == (expected_newest / file).read_bytes()


def logged(run: Path) -> int:
    """Complete lines of the metrics so far."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def kill_when(args: list[str], moment: Callable[[], bool]) -> None:
    """Start `python train.py ...` and kill it with signal 9 as soon as `moment` is true."""
    command = [sys.executable, "train.py", *args]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not moment():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"ended before the moment came: {process.communicate()[1]}")
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.long
def test_a_killed_run_resumes_to_the_same_result(reference, tmp_path):
    args, run = arguments(tmp_path, *SETTINGS), tmp_path / "run"

    kill_when(args, lambda: logged(run) >= 3)  # between two checkpoints
    assert checkpoints(run) and not (run / "adapter_model.safetensors").exists()

    def being_written() -> bool:
        """A checkpoint is in the making: its hidden folder exists and its name does not."""
        return logged(run) >= 5 and any((run / "checkpoints").glob(".step-*"))

    kill_when(args, being_written)
    done = start("train.py", *args)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stderr
    assert_equal(run, reference)


# ---- killed at a chosen instruction ----------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(owner: object, name: str, number: int, condition: Callable[..., bool] = lambda *args: True) -> None:
    """Kill this process at the `number`-th call of `owner.name` whose arguments satisfy `condition`."""
    genuine, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        if condition(*args, **kwargs):
            calls.append(args)
            if len(calls) == number:
                die()
        return genuine(*args, **kwargs)

    setattr(owner, name, wrapper)


def half_a_line(number: int) -> None:
    """Write half of the metrics line of a step, then die."""
    import train.metrics

    genuine = train.metrics.Metrics.log

    def log(self, record):
        if record["step"] == number:
            self._file.write(f'{{"step": {number}, "epo')
            self._file.flush()
            die()
        genuine(self, record)

    train.metrics.Metrics.log = log


def arm(moment: str) -> None:
    import train.checkpoint

    if moment == "before the first checkpoint":
        on_call(torch.Tensor, "backward", 2)
    elif moment == "while metrics are written":
        half_a_line(5)
    elif moment == "while the adapter of a checkpoint is written":
        on_call(os, "fsync", 3, lambda descriptor: ".adapter." in os.readlink(f"/proc/self/fd/{descriptor}"))
    elif moment == "while the optimizer is written":
        # Calls by turns: optimizer, random state.
        on_call(train.checkpoint, "save_file", 3)
    elif moment == "before the rename":
        on_call(os, "rename", 3, lambda source, target: "step-" in str(target))
    elif moment == "after the rename, before old ones go":
        on_call(train.checkpoint, "remove_directory", 1)
    elif moment == "while an old checkpoint is deleted":
        unlink = os.unlink

        def dies_after_one(path, **kwargs):
            unlink(path, **kwargs)
            folder = os.readlink(f"/proc/self/fd/{kwargs['dir_fd']}") if kwargs.get("dir_fd") else str(path)
            name = Path(folder).name
            if "step-" in name and not name.endswith(".tmp"):
                die()

        os.unlink = dies_after_one
    elif moment == "while the final adapter is written":
        on_call(Path, "replace", 2, lambda source, target: "checkpoints" not in str(target))
    else:
        raise AssertionError(moment)


def train_until(moment: str, args: list[str]) -> None:
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as this process lives
    arm(moment)
    main(args)


MOMENTS = ["while the adapter of a checkpoint is written", "before the rename", "while the final adapter is written"]
MORE_MOMENTS = [
    "before the first checkpoint",
    "while metrics are written",
    "while the optimizer is written",
    "after the rename, before old ones go",
    "while an old checkpoint is deleted",
]


@pytest.fixture(scope="module")
def processes():
    """Real processes that start without importing everything again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.loop", "peft"])
    return context


def killed_at(moment: str, args: list[str], processes) -> None:
    process = processes.Process(target=train_until, args=(moment, args))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, f"not killed but ended with {process.exitcode}"


@pytest.mark.parametrize("moment", [*MOMENTS, *(pytest.param(one, marks=pytest.mark.long) for one in MORE_MOMENTS)])
def test_killed_at_the_worst_moments(reference, tmp_path, processes, moment):
    args, run = arguments(tmp_path, *SETTINGS), tmp_path / "run"
    killed_at(moment, args, processes)
    assert not (run / "adapter_model.safetensors").exists() or moment == "while the final adapter is written"
    assert main(args) == 0
    assert_equal(run, reference)


def test_every_listed_checkpoint_is_complete(tmp_path, processes):
    """Also after a kill while an old one is deleted: a partial checkpoint must not keep its name."""
    killed_at("while an old checkpoint is deleted", arguments(tmp_path, *SETTINGS), processes)
    for folder in checkpoints(tmp_path / "run"):
        assert {*FILES, "adapter_config.json", "budget_profile.json"} <= {path.name for path in folder.iterdir()}


# ---- leftovers of killed runs ----------------------------------------------------------------------------------------


def interrupted(tmp_path: Path, monkeypatch, after: int) -> tuple[list[str], Path]:
    """A run that was killed in the step after `after`."""
    import train.loop

    args, run = arguments(tmp_path, *SETTINGS), tmp_path / "run"

    class Stop(BaseException):
        pass

    genuine = train.loop.Metrics.log

    def log(self, record):
        genuine(self, record)
        if record["step"] == after + 1:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(train.loop.Metrics, "log", log)
        with pytest.raises(Stop):
            main(args)
    assert [path.name for path in checkpoints(run)][-1] == f"step-{after:08d}"
    return args, run


def copied(reference: Path, tmp_path: Path) -> tuple[list[str], Path]:
    """A copy of the finished run, to be damaged, and the arguments that resume it."""
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    return [*arguments(reference.parent, *SETTINGS), f"output_dir={run}"], run


@pytest.mark.long
def test_leftovers_of_killed_runs_do_no_harm(reference, tmp_path, monkeypatch):
    args, run = interrupted(tmp_path, monkeypatch, after=4)
    folder = run / "checkpoints"
    shutil.copytree(checkpoints(run)[-1], folder / ".step-00000006.0badf00d.tmp")
    (folder / ".step-00000006.0badf00d.tmp" / "optimizer.safetensors").write_bytes(b"half")
    (run / ".adapter").mkdir()
    (run / ".adapter" / "adapter_model.safetensors").write_bytes(b"half")
    (run / ".recipe.yaml.0badf00d.tmp.yaml").write_text("model: {")
    assert main(args) == 0
    assert_equal(run, reference)


@pytest.mark.long
def test_a_resumed_run_deletes_the_leftovers_of_the_killed_one(tmp_path, monkeypatch):
    """A job that is killed and requeued many times must not fill the disk with partial checkpoints."""
    args, run = interrupted(tmp_path, monkeypatch, after=4)
    shutil.copytree(checkpoints(run)[-1], run / "checkpoints" / ".step-00000006.0badf00d.tmp")
    assert main(args) == 0
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]


def test_the_same_settings_under_another_name_are_the_same_run(reference, tmp_path):
    """`recipe=quickstart` and `recipe=recipes/quickstart.yaml`, or a recipe file that was moved."""
    args, run = copied(reference, tmp_path)
    moved = tmp_path / "moved.yaml"
    shutil.copy(args[0].removeprefix("recipe="), moved)
    assert main([f"recipe={moved}", *args[1:]]) == 0
    assert_equal(run, reference)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncated", "missing", "emptied"])
def test_a_damaged_checkpoint_is_named_in_one_line(reference, tmp_path, capsys, file, damage):
    args, run = copied(reference, tmp_path)
    (run / "adapter_model.safetensors").unlink()
    newest = checkpoints(run)[-1]
    damaged = newest / file
    if damage == "missing":
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2 if damage == "truncated" else 0])
    capsys.readouterr()
    assert main(args) == 2
    (line,) = [line for line in lines(capsys.readouterr().err) if not line.startswith("omnimem.")]
    assert line.startswith("train: ") and str(newest) in line and "delete it" in line
    assert not (run / "adapter_model.safetensors").exists()
    if file == "state.json" and damage == "truncated":  # doing as the line says helps
        shutil.rmtree(newest)
        assert main(args) == 0
        assert_equal(run, reference)


def test_a_checkpoint_that_lacks_a_weight_is_damaged(reference, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    args, run = copied(reference, tmp_path)
    newest = checkpoints(run)[-1]
    weights = load_file(newest / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, newest / "adapter_model.safetensors")
    capsys.readouterr()
    assert main(args) == 2
    assert str(newest) in lines(capsys.readouterr().err)[-1]


def test_a_metrics_file_that_ends_in_half_a_line_is_repaired(reference, tmp_path):
    args, run = copied(reference, tmp_path)
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    shutil.rmtree(checkpoints(run)[-1])  # steps 5 and 6 are to be taken again
    path.write_bytes(whole[: whole.rindex(b'"loss"')])
    assert main(args) == 0
    assert_equal(run, reference)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_stop_saves_the_current_step(reference, tmp_path, monkeypatch, capsys, number):
    """Between checkpoints too: no step is lost, and the run resumes to the same result."""
    import train.loop

    args, run = arguments(tmp_path, *SETTINGS), tmp_path / "run"
    genuine = train.loop.Metrics.log
    handler = signal.getsignal(number)

    def log(self, record):
        genuine(self, record)
        if record["step"] == 4:
            os.kill(os.getpid(), number)  # arrives in the fifth step

    with monkeypatch.context() as patch:
        patch.setattr(train.loop.Metrics, "log", log)
        assert main(args) == 1
    assert signal.getsignal(number) == handler
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in checkpoints(run)][-1] == "step-00000005"
    assert main(args) == 0
    assert_equal(run, reference)

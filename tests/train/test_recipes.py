"""Recipes: every one can be planned, the quickstart runs from launch to answer, a full disk loses no checkpoint."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train.loop
from omnimem.budget import BudgetProfile
from omnimem.recipe import list_recipes, load_recipe
from omnimem.selection.heads_file import HEADS_FILE
from small_runs import (
    ROOT,
    adapter,
    arguments,
    environment,
    lines,
    main,
    metrics,
    start,
    trained_run,
    tree,
    weights_bytes,
)
from train.checkpoint import checkpoints

ACCELERATE = Path(sys.executable).with_name("accelerate")


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_parses_and_can_be_planned(name, tmp_path, monkeypatch, capsys):
    head = (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()[0]
    assert head.startswith("# accelerate launch ") and f"train.py recipe={name}" in head
    monkeypatch.chdir(tmp_path)
    assert main([f"recipe={name}", "dry_run=true"]) == 0
    shown = capsys.readouterr().out
    assert "optimizer steps" in shown and "activations" in shown
    assert not list(tmp_path.iterdir())


IN_THE_SUITE = ("video_salmonn_lora", "release_sft", "selection_only")
"""Recipes that the suite trains; the others train with -m long."""


@pytest.mark.parametrize(
    "name",
    [
        name if name in IN_THE_SUITE else pytest.param(name, marks=pytest.mark.long)
        for name in list_recipes()
        if name != "quickstart"
    ],
)
def test_every_recipe_trains_the_tiny_model(name, tmp_path):
    out = tmp_path / "out"
    assert (
        main(
            [
                f"recipe={name}",
                "model.name_or_path=tiny",
                "train.max_steps=1",
                "data.max_seconds=6",
                f"output_dir={out}",
            ]
        )
        == 0
    )
    assert load_file(out / HEADS_FILE) if name == "selection_only" else adapter(out)
    assert BudgetProfile.load(out / "budget_profile.json").mean_budget == 8192


def test_quickstart_end_to_end(tmp_path):
    out = tmp_path / "out"
    command = [ACCELERATE, "launch", "train.py", "recipe=quickstart", "train.max_steps=2", f"output_dir={out}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked, answer = done.stdout.strip().split("\n", 1)
    assert asked == "speech_nasa_webb_narration_multistream.mp4: What is heard?"
    assert answer.startswith("→ ")
    assert [record["step"] for record in metrics(out)] == [1, 2]
    assert (out / "merged" / "model.safetensors").is_file()
    assert BudgetProfile.load(out / "merged" / "budget_profile.json").mean_budget == 96
    assert adapter(out)
    assert load_recipe([f"recipe={out / 'recipe.yaml'}"]).train.max_steps == 2


def test_an_unknown_recipe_lists_the_known_ones():
    done = start("train.py", "recipe=nosuch")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = lines(done.stderr)
    assert line.startswith("train: ") and "nosuch" in line
    assert all(name in line for name in list_recipes()) and "quickstart" in line


def errors(stderr: str) -> list[str]:
    """Lines that are neither the progress bar nor the log."""
    return [line for line in lines(stderr) if "%|" not in line and not line.startswith("omnimem.")]


# ---- a full disk -----------------------------------------------------------------------------------------------------


def fails_at(monkeypatch, name: str, number: int, folder: str) -> None:
    """Simulate a full disk from the `number`-th call of `os.name` with a path that contains `folder`."""
    genuine, calls = getattr(os, name), []

    def full(first, *args, **kwargs):
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
        if folder in path:
            calls.append(path)
            if len(calls) >= number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return genuine(first, *args, **kwargs)

    monkeypatch.setattr(os, name, full)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    return trained_run(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize(
    ("call", "number", "folder"),
    [
        ("fsync", 1, "/.step-00000004"),  # flushing the second checkpoint
        ("rename", 1, "/.step-00000004"),  # giving it its name
        *(
            pytest.param(*row, marks=pytest.mark.long)
            for row in (
                ("fsync", 4, "/.step-00000004"),
                ("fsync", 3, "/metrics.jsonl"),  # a line of the metrics
                ("fsync", 1, "run/..adapter"),  # the adapter of the finished run
                ("replace", 1, "run/.budget_profile"),
            )
        ),
    ],
)
def test_a_full_disk_is_one_line_and_loses_no_checkpoint(
    reference, tmp_path, monkeypatch, capsys, call, number, folder
):
    args, run = arguments(tmp_path), tmp_path / "run"
    genuine = {}

    def remember(*args):
        path = genuine["save"](*args)
        genuine.setdefault("saved", tree(path))
        return path

    with monkeypatch.context() as patch:
        genuine["save"] = train.loop.save_checkpoint
        patch.setattr(train.loop, "save_checkpoint", remember)
        fails_at(patch, call, number, folder)
        capsys.readouterr()
        assert main(args) == 2
    told = errors(capsys.readouterr().err)
    assert len(told) == 1, told
    assert told[0].startswith("train: ") and "no space left on the disk" in told[0]
    assert "step-00000002" in [path.name for path in checkpoints(run)]
    assert tree(run / "checkpoints" / "step-00000002") == genuine["saved"], "the earlier checkpoint is as it was"
    assert not [path for path in run.rglob(".step-*")], "half a checkpoint left behind"

    assert main(args) == 0  # with free space the run continues
    assert weights_bytes(run) == weights_bytes(reference)
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4]


@pytest.mark.long
def test_a_real_full_disk(tmp_path):
    unshare = shutil.which("unshare")
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = [str(unshare), "--user", "--map-root-user", "--mount"]
    # Base and first checkpoint take about 2 MiB; adapters of this rank do not fit a second time.
    mount = f"mount -t tmpfs -o size=6m tmpfs {disk}"
    if not unshare or subprocess.run([*inside, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs a user namespace to mount a small tmpfs in")
    args = arguments(tmp_path, "lora.r=64", "train.save_steps=1", "train.save_total_limit=9", "train.max_steps=9")
    args.append(f"output_dir={disk / 'run'}")
    script = f'{mount} && "$@"; status=$?; ls -A {disk}/run/checkpoints; exit $status'
    command = [*inside, "sh", "-c", script, "sh", sys.executable, "train.py", *args]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True)
    told = errors(done.stderr.decode())
    assert done.returncode == 2, told
    assert len(told) == 1 and "no space left on the disk" in told[0], told
    left = done.stdout.decode().split()
    assert left and left == [f"step-{number:08d}" for number in range(1, len(left) + 1)]


def test_threads_of_a_recipe_are_used(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train.loop, "environment", lambda: seen.append(torch.get_num_threads()) or {})
    trained_run(tmp_path, "train.max_steps=1", "train.threads=2")
    assert seen == [2]


STARTED_ELSEWHERE = ("single", "multi_gpu", "multi_node", "deepspeed_zero2", "deepspeed_zero3")
"""Launch configurations that other tests of the suite train with."""


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.long] if path.stem in STARTED_ELSEWHERE else [])
        for path in sorted((ROOT / "launch").glob("*.yaml"))
    ],
)
def test_every_launch_configuration_starts(tmp_path, file):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file)]
    nothing_after = ["finish.export=false", "finish.question=null", "finish.media=null"]
    args = [*arguments(tmp_path, "train.max_steps=1"), *nothing_after]
    done = start(*launcher, "train.py", *args)
    assert done.returncode == 0, done.stderr
    assert "not passed to `accelerate launch`" not in done.stderr
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1]

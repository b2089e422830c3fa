"""Two processes on the CPU train what one process trains with twice the accumulation, and one of them writes."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

from omnimem.backbones import load_backbone
from small_runs import ROWS, SILENT, SPEECH, adapter, arguments, lines, main, metrics, start
from train.config import load_recipe
from train.data import Schedule, load_rows, tokenise

UNEQUAL = [
    *ROWS,
    {"media": SPEECH, "question": "What is heard?", "answer": "Two sentences about a film."},
    {"media": SILENT, "question": "What is seen?", "answer": "A mirror.", "time": 2},
]
"""Picture and sound of 5 s and of 8 s, sound alone, picture alone: 2 to 4 chunks, one or two questions."""

SETTINGS = ("train.max_steps=2", "train.save_every=1", "model.dtype=float64", "lora.dropout=0.0")
"""In float64, because Adam's first steps are the sign of the gradient: rounding would decide it where that is small."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(*args: str):
    return start(
        "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), "train.py", *args,
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    args = arguments(folder, *SETTINGS, "train.batch_size=1", rows=UNEQUAL)
    return args, folder / "run", launch(*args)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    assert main(arguments(folder, *SETTINGS, "train.accumulation=2", rows=UNEQUAL)) == 0
    return folder / "run"


def test_two_processes_train_what_one_trains(two, one):
    _, run, done = two
    assert done.returncode == 0, done.stderr
    trained, expected = adapter(run), adapter(one)
    assert trained.keys() == expected.keys()
    assert max((trained[name] - expected[name]).abs().max().item() for name in expected) <= 1e-6
    assert all(value.any() for name, value in trained.items() if "lora_B" in name)
    for found, wanted in zip(metrics(run), metrics(one), strict=True):
        for name in ("step", "epoch", "lr", "targets", "positions", "skipped"):
            assert found[name] == wanted[name]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-6)


def test_the_streams_of_the_ranks_were_unequal(two):
    """Otherwise the comparison above would say little: ranks take different numbers of chunks and questions."""
    args, _, _ = two
    recipe = load_recipe(args)
    backbone = load_backbone("tiny", device="meta", dtype="float32")
    samples = [tokenise(row, backbone) for row in load_rows(recipe.data).rows]
    schedule = Schedule(samples, recipe.train, recipe.data.shuffle, processes=2)
    for step in range(2):
        first, second = (schedule.step(step, rank)[0][0].row.name for rank in (0, 1))
        assert first != second


def test_one_process_writes_and_speaks(two):
    _, run, done = two
    expected = {
        "adapter_model.safetensors", "adapter_config.json", "budget_profile.json", "recipe.yaml", "data.json",
        "metrics.jsonl", "environment.json", "base", "checkpoints",
    }  # fmt: skip
    assert {path.name for path in run.iterdir()} - {"tensorboard"} == expected
    assert [record["step"] for record in metrics(run)] == [1, 2]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000001", "step-00000002"]
    newest = run / "checkpoints" / "step-00000002"
    # The random state is each rank's own.
    assert {path.name for path in newest.glob("rng-*")} == {"rng-0.safetensors", "rng-1.safetensors"}
    assert json.loads((newest / "state.json").read_text())["processes"] == 2
    if (run / "tensorboard").exists():
        assert len(list((run / "tensorboard").iterdir())) == 1
    shown = lines(done.stderr)
    assert len([line for line in shown if "adapter and budget profile saved" in line]) == 1
    assert len([line for line in shown if line.startswith("train: 100%")]) == 1


def test_a_run_of_two_processes_is_not_continued_by_one(two, capsys):
    args, run, _ = two
    before = adapter(run)
    capsys.readouterr()
    assert main([*args, "train.max_steps=3"]) == 2
    line = lines(capsys.readouterr().err)[-1]
    assert "saved by 2 processes, resumed by 1" in line and line.startswith("train: ")
    assert all(torch.equal(value, before[name]) for name, value in adapter(run).items())

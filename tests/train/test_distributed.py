"""Two processes, with DDP or ZeRO, equal one process with twice the gradient accumulation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omnimem.backbones import load_backbone
from omnimem.recipe import load_recipe
from omnimem.selection.heads_file import HEADS_FILE
from small_runs import (
    HALF,
    PLAIN,
    ROOT,
    ROWS,
    SILENT,
    SPEECH,
    adapter,
    arguments,
    configured,
    free_port,
    largest_difference,
    lines,
    main,
    metrics,
    start,
)
from train.data import load_rows
from train.samples import tokenize_row
from train.schedule import Schedule

UNEQUAL = [
    *ROWS,
    {"media": SPEECH, "question": "What is heard?", "answer": "Two sentences about a film."},
    {"media": SILENT, "question": "What is seen?", "answer": "A mirror.", "time": 2},
]
"""Video with audio of 5 s and of 8 s, audio only, video only: 2 to 4 chunks, one or two questions."""

SETTINGS = ("train.max_steps=2", "train.save_steps=1", "model.dtype=float64", "lora.lora_dropout=0.0")
"""In float64, because Adam's first steps are the sign of the gradient, which rounding changes where it is small."""


def launch(*args: str):
    return start(
        "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), "train.py", *args,
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    args = arguments(folder, *SETTINGS, "train.per_device_train_batch_size=1", rows=UNEQUAL)
    return args, folder / "run", launch(*args)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    assert main(arguments(folder, *SETTINGS, "train.gradient_accumulation_steps=2", rows=UNEQUAL)) == 0
    return folder / "run"


def test_two_processes_equal_one(two, one):
    _, run, done = two
    assert done.returncode == 0, done.stderr
    trained, expected = adapter(run), adapter(one)
    assert trained.keys() == expected.keys()
    assert max((trained[name] - expected[name]).abs().max().item() for name in expected) <= 1e-6
    assert all(value.any() for name, value in trained.items() if "lora_B" in name)
    for found, wanted in zip(metrics(run), metrics(one), strict=True):
        for name in ("step", "epoch", "learning_rate", "answer_tokens", "tokens", "skipped"):
            assert found[name] == wanted[name]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-6)


def test_the_streams_of_the_ranks_have_different_lengths(two):
    """Otherwise the comparison above would prove little: ranks run different numbers of chunks and questions."""
    args, _, _ = two
    recipe = load_recipe(args)
    backbone = load_backbone("tiny", device="meta", dtype="float32")
    samples = [tokenize_row(row, backbone) for row in load_rows(recipe.data).rows]
    schedule = Schedule(samples, recipe.train, recipe.data.shuffle, processes=2)
    for step in range(2):
        first, second = (schedule.batches(step, rank)[0][0].row.name for rank in (0, 1))
        assert first != second


def test_one_process_writes_and_logs(two):
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
    assert len([line for line in shown if line.startswith("omnimem.train: step 2/2 loss ")]) == 1
    environment = json.loads((run / "environment.json").read_text())
    assert (environment["processes"], environment["distributed"], environment["backend"]) == (2, "ddp", "gloo")
    assert f"output_dir={run}" in environment["command"]


def test_a_run_of_two_processes_is_not_resumed_by_one(two, capsys):
    args, run, _ = two
    before = adapter(run)
    capsys.readouterr()
    assert main([*args, "train.max_steps=3"]) == 2
    line = lines(capsys.readouterr().err)[-1]
    assert "saved by 2 processes, resumed by 1" in line and line.startswith("train: ")
    assert all(torch.equal(value, before[name]) for name, value in adapter(run).items())


# ---- the same parameters with every strategy -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[[str], Path]:
    """Run of one process with the settings of that name in `EXTRAS`."""

    @cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp(f"alone_{name}")
        more = ("train.gradient_accumulation_steps=2", *EXTRAS[name])
        assert main(arguments(folder, *PLAIN, *more, rows=UNEQUAL)) == 0
        return folder / "run"

    return run


EXTRAS = {
    "hard": ("selection.gradient=none",),
    "all_options": (
        "selection.method=learned",
        "selection.attention_term=true",
        "selection.age_term=true",
        "gate.gradient_scale=0.1",  # clipping would leave little of the gradient of LoRA beside that of the heads
        "distill.weight=0.5",
        "train.bptt_window=2",
        "train.detach_below_layer=1",
    ),
    "heads": ("selection.method=learned", "gate.gradient_scale=0.1"),
    "probes": ("selection.method=streammem", "selection.gradient=none"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "extra"),
    [
        ("deepspeed_zero3", "heads"),
        *(
            pytest.param(*row, marks=pytest.mark.long)
            for row in (
                ("deepspeed_zero3", "all_options"),
                ("deepspeed_zero2", "heads"),
                ("multi_gpu", "heads"),
                ("multi_gpu", "hard"),
                ("deepspeed_zero2", "hard"),
                ("deepspeed_zero2", "all_options"),
                ("deepspeed_zero2", "probes"),
                ("deepspeed_zero3", "probes"),
                ("deepspeed_zero3", "hard"),
                ("deepspeed_zero3_offload", "hard"),
                ("deepspeed_zero3_offload", "all_options"),
            )
        ),
    ],
)
def test_parameters_equal_those_of_one_process(tmp_path, alone, launcher, extra):
    done = configured(launcher, *arguments(tmp_path, *PLAIN, *EXTRAS[extra], rows=UNEQUAL))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert largest_difference(adapter(run), adapter(alone(extra))) <= 1e-6
    if extra in ("all_options", "heads"):
        found, expected = (load_file(one / HEADS_FILE) for one in (run, alone(extra)))
        assert largest_difference(found, expected) <= 1e-6
        assert all(value.abs().max() > 0 for value in found.values()), "every weight of the heads moved"
    kind = "ddp" if launcher == "multi_gpu" else f"deepspeed zero {3 if 'zero3' in launcher else 2}"
    assert json.loads((run / "environment.json").read_text())["distributed"] == kind
    assert all(value.abs().max() > 1e-4 for name, value in adapter(run).items() if "lora_B" in name), "it moved"
    for found, wanted in zip(metrics(run), metrics(alone(extra)), strict=True):
        assert (found["step"], found["answer_tokens"], found["tokens"]) == (
            wanted["step"], wanted["answer_tokens"], wanted["tokens"],
        )  # fmt: skip
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["deepspeed_zero2", "deepspeed_zero3"])
def test_a_sharded_run_resumes_to_the_same_parameters(tmp_path, launcher):
    """With AdamW, whose state is restored; evaluations take place before and after."""
    settings = ("train.save_steps=2", "lora.lora_dropout=0.1", "train.max_steps=3")
    args = arguments(tmp_path, *settings, rows=UNEQUAL)
    evaluated = (f"eval.path={tmp_path / 'data.jsonl'}", "eval.eval_steps=2", f"eval.root={args[2].split('=')[1]}")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = configured(launcher, *args, *evaluated, f"output_dir={whole}")
    assert done.returncode == 0, done.stderr
    shutil.copytree(whole, parts)
    for name in ("checkpoints/step-00000003", "best"):
        shutil.rmtree(parts / name)
    (parts / "adapter_model.safetensors").unlink()
    done = configured(launcher, *args, *evaluated, f"output_dir={parts}")
    assert done.returncode == 0, done.stderr
    assert "resuming after step 2" in done.stderr
    assert largest_difference(adapter(whole), adapter(parts)) == 0
    # Questions are asked after the second step, which is not taken again, and after the third.
    losses = [[record.get("eval_loss") for record in metrics(run)] for run in (whole, parts)]
    assert losses[0] == losses[1] and [loss is None for loss in losses[0]] == [True, False, False]


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["multi_gpu", "deepspeed_zero2"])
def test_every_process_group_has_the_timeout_of_the_recipe(tmp_path, launcher):
    """DeepSpeed creates its own group, which would have the backend's default (10 minutes with NCCL)."""
    script = tmp_path / "timeouts.py"
    script.write_text(
        "import pathlib, os, runpy, sys, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train.loop\n"
        "from torch.distributed.distributed_c10d import _world\n"
        "genuine = train.loop.new_strategy\n"
        "def started(*args):\n"
        "    genuine(*args)\n"
        "    backends = [group._get_backend(torch.device('cpu')) for group in _world.pg_map]\n"
        "    seconds = ' '.join(str(backend.options._timeout.total_seconds()) for backend in backends)\n"
        f"    pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(seconds)\n"
        "    sys.exit()\n"
        "train.loop.new_strategy = started\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    done = configured(launcher, *arguments(tmp_path, *PLAIN, "train.ddp_timeout=4321", rows=UNEQUAL), script=script)
    assert done.returncode == 0, done.stderr
    for rank in ("0", "1"):
        found = [float(seconds) for seconds in (tmp_path / rank).read_text().split()]
        assert len(found) == (2 if launcher == "deepspeed_zero2" else 1) and set(found) == {4321.0}


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["deepspeed_zero2", "deepspeed_zero3"])
def test_all_processes_skip_a_sharded_step_that_is_not_finite(tmp_path, launcher):
    """One process has the bad clip; no process updates its parameters, and the run continues."""
    script = tmp_path / "poisoned.py"
    script.write_text(
        "import os, runpy, sys\n"
        "from omnimem.forward import Stream\n"
        "genuine, calls = Stream.answer_logits, []\n"
        "def answered(self, *args):\n"
        "    logits, targets = genuine(self, *args)\n"
        "    if os.environ['RANK'] != '1' or not logits.requires_grad: return logits, targets\n"
        "    calls.append(0)\n"
        "    # On the way back alone, so that the loss that is logged is finite and the gradient's norm has to tell.\n"
        "    return logits * float('nan') if len(calls) == 1 else logits, targets\n"
        "Stream.answer_logits = answered\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    args = arguments(tmp_path, *PLAIN, "train.save_steps=1", "train.save_total_limit=9", rows=UNEQUAL)
    done = configured(launcher, *args, script=script)
    assert done.returncode == 0, done.stderr
    found = [record["skipped"] for record in metrics(tmp_path / "run")]
    assert found == [True, False, False]
    first, second = (
        load_file(tmp_path / "run" / "checkpoints" / f"step-{n:08d}" / "adapter_model.safetensors") for n in (1, 2)
    )
    assert not any(value.any() for name, value in first.items() if "lora_B" in name)
    assert any(value.any() for name, value in second.items() if "lora_B" in name)


SOUND = {"media": SPEECH, "question": "What is heard?", "answer": "Two sentences."}
PICTURE = {"media": SILENT, "question": "What is seen?", "answer": "A mirror."}


@pytest.mark.long
def test_projectors_train_with_zero_2_when_a_process_has_no_frames(tmp_path):
    """One process has audio, the other video; each has gradients for one projector, both update both."""
    settings = (
        *PLAIN,
        "lora.modules_to_save=[visual,audio]",
        "train.modules_to_save_learning_rate=1e-2",
        "data.shuffle=false",
    )
    one = arguments(tmp_path, *settings, "train.gradient_accumulation_steps=2", rows=[SOUND, PICTURE], out="one")
    assert main(one) == 0
    two = arguments(tmp_path, *settings, rows=[SOUND, PICTURE], out="two")
    done = configured("deepspeed_zero2", *two)
    assert done.returncode == 0, done.stderr
    assert largest_difference(adapter(tmp_path / "one"), adapter(tmp_path / "two")) <= 1e-6


@pytest.mark.slow
def test_a_skipped_clip_does_not_block_other_processes(tmp_path):
    rows = [SOUND, {"media": HALF, "question": "What is seen?", "answer": "A rabbit."}]
    settings = (*PLAIN, "data.on_bad_row=skip", "data.shuffle=false", "train.max_steps=2")
    done = configured("deepspeed_zero2", *arguments(tmp_path, *settings, rows=rows))
    assert done.returncode == 0, done.stderr
    assert [record["skipped"] for record in metrics(tmp_path / "run")] == [False, False]


@pytest.mark.long
def test_projectors_under_zero_3_are_one_line(tmp_path):
    done = configured("deepspeed_zero3", *arguments(tmp_path, "lora.modules_to_save=[audio]"))
    assert done.returncode != 0 and "projectors are trained with ZeRO-2" in done.stderr


@pytest.mark.long
def test_disabled_deepspeed_is_one_line(tmp_path):
    done = start("train.py", *arguments(tmp_path), ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_USE_CPU="true")
    assert done.returncode == 2
    assert "ACCELERATE_USE_CPU disables it" in lines(done.stderr)[-1]

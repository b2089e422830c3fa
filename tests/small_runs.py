"""Small training runs for the tests: two short real clips, the tiny model, a cache that must evict.

One thread, so that a run in the test's process and one in a separate process give the same bits.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from clips import MEDIA, ROOT
from omnimem.cli import main as omnimem

FLOWER = "silent_track_flower_timelapse_5s.webm"
RABBIT = "ambient_toy_rabbit_8s.mp4"
SPEECH = "audio_speech_commentary_mono16k_7s.mp3"
SILENT = "odd_vfr_no_audio_nasa.mp4"
HALF = "broken_truncated_half_toy_rabbit.mp4"
NO_INDEX = "broken_truncated_no_moov_nasa.mp4"

ROWS = [
    {"media": FLOWER, "questions": [{"question": "What is seen?", "answer": "A red flower."}]},
    {
        "media": RABBIT,
        "questions": [
            {"question": "What is seen?", "answer": "A toy rabbit on a table."},
            {"question": "What is heard?", "answer": "Room noise.", "time": 4},
        ],
    },
]

RECIPE = """
model: {name_or_path: tiny, dtype: float32}
data: {chunk_seconds: 2.0}
memory: {mean_budget: 24}
lora: {r: 4, lora_alpha: 8, lora_dropout: 0.0, target_modules: [q_proj, k_proj, v_proj, o_proj]}
train: {max_steps: 4, learning_rate: 1.0e-2, save_steps: 2, threads: 1}
"""
PLAIN = ("train.optim=sgd", "train.max_steps=3", "train.save_steps=3", "lora.lora_dropout=0.0", "model.dtype=float32")
"""SGD shows errors of scale, to which Adam is invariant."""

VISUAL, AUDIO = 20, 4  # 24 tokens at the default ratio of 5


def write_manifest(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def arguments(folder: Path, *overrides: str, rows: Sequence[dict[str, Any]] = ROWS, out: str = "run") -> list[str]:
    """Arguments of `train.py` for a small run in `folder`/`out`; recipe and manifest are written beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.yaml").write_text(RECIPE)
    data = write_manifest(folder / "data.jsonl", rows)
    return [
        f"recipe={folder / 'small.yaml'}",
        f"data.path={data}",
        f"data.root={MEDIA}",
        f"output_dir={folder / out}",
        *overrides,
    ]


def main(args: Sequence[str]) -> int:
    """`python train.py ...` inside this process; returns its exit status."""
    threads = torch.get_num_threads()
    try:
        return runpy.run_path(str(ROOT / "train.py"))["main"](list(args))
    finally:
        torch.set_num_threads(threads)


def trained_run(folder: Path, *overrides: str, **options: Any) -> Path:
    """Train inside this process, check that it succeeds, return the folder of the run."""
    args = arguments(folder, *overrides, **options)
    assert main(args) == 0
    return folder / options.get("out", "run")


def refused(args: list[str], capsys) -> str:
    """The error line of a run that must not start and must not change the folder."""
    capsys.readouterr()
    assert main(args) == 2
    (line,) = lines(capsys.readouterr().err)
    assert line.startswith("train: ")
    return line


def refused_export(capsys, run: Path, out: Path, *options: str) -> str:
    """The error line of an export that must be refused; the run and `out` stay unchanged."""
    before = tree(run), tree(out) if out.is_dir() else None
    beside = sorted(path.name for path in out.parent.iterdir()) if out.parent.is_dir() else None
    capsys.readouterr()
    assert omnimem(["export", str(run), "--out", str(out), *options]) == 2
    (line,) = lines(capsys.readouterr().err)
    assert line.startswith("omnimem: ")
    assert (tree(run), tree(out) if out.is_dir() else None) == before
    assert beside == (sorted(path.name for path in out.parent.iterdir()) if out.parent.is_dir() else None)
    return line


def environment(**more: str) -> dict[str, str]:
    """Environment of a child process: one thread, no network, nothing inherited from a launcher."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return {**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **more}


def start(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `python ...` from the repository's root."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment(**more), capture_output=True)
    # Decoded here, because text mode would convert the carriage returns of a progress bar into newlines.
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter_model.safetensors")


def weights_bytes(run: Path) -> bytes:
    return (run / "adapter_model.safetensors").read_bytes()


def copy_run(run: Path, target: Path) -> Path:
    shutil.copytree(run, target)
    return target


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines(text: str) -> list[str]:
    """Lines that a terminal would show, without text that a progress bar has overwritten."""
    return [line.split("\r")[-1].rstrip() for line in text.split("\n") if line.split("\r")[-1].strip()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def configured(name: str, *args: str, script: Path = ROOT / "train.py"):
    """Run two processes by `accelerate launch` with one of the files in launch/."""
    cpu = {"ACCELERATE_USE_CPU": "true"} if name == "multi_gpu" else {}
    launcher = ("-m", "accelerate.commands.launch", "--config_file", f"launch/{name}.yaml", "--num_processes", "2")
    return start(*launcher, "--main_process_port", str(free_port()), script, *args, PYTHONPATH=str(ROOT), **cpu)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)

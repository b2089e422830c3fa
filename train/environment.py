"""Environment of a run for environment.json: versions, machine, git commit, processes, command line."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from train.deepspeed_strategy import zero_stage

PACKAGES = (
    "omnimem", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "omegaconf", "av", "numpy",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Python, packages, platform, accelerator, git commit (None outside a checkout)."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "devices": torch.cuda.device_count(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def launch_of(accelerator: Accelerator) -> dict[str, Any]:
    """How the run was launched: command line, number of processes, parallel strategy, communication backend."""
    stage, processes = zero_stage(accelerator), accelerator.num_processes
    return {
        "command": shlex.join(sys.orig_argv),
        "processes": processes,
        "distributed": f"deepspeed zero {stage}" if stage else "ddp" if processes > 1 else "none",
        "backend": dist.get_backend() if dist.is_initialized() else None,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except OSError:
        return None
    return result.stdout.strip() or None

"""A record of what a run ran on: versions, machine, source revision."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "omnimem", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "omegaconf", "av", "numpy",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Python, packages, platform, accelerator, git commit (null outside a checkout)."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "devices": torch.cuda.device_count(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
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

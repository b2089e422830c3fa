"""Peak memory: tensors on the GPU, or the resident set of the process.

The resident set contains the interpreter, its libraries, and pages of mapped files, which the kernel can drop when
memory is short. It is an upper bound of what the process needs.
"""

from __future__ import annotations

import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def reset_peak() -> None:
    """Restart the peak of the resident set at its present size, where the kernel supports it (Linux)."""
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """Largest resident set in bytes since `reset_peak`, or since the process started."""
    try:
        # Not ru_maxrss, which a child process inherits from its parent.
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text())[0])
    except (OSError, IndexError):
        # Kilobytes on Linux, bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_gib() -> float:
    """Peak in GiB: tensors on the GPU if there is one, else the resident set."""
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss_bytes()) / 2**30

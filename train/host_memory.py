"""Peak resident memory of this process.

The resident set is that of the whole process: the interpreter, its libraries, and the pages of mapped files, which the
kernel can drop when memory is short. It is therefore an upper bound of what a step of the process needs.
"""

from __future__ import annotations

import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

PROCESS = Path("/proc/self")


def reset_peak() -> None:
    """Start the peak again from the present level, where the kernel can do so (Linux)."""
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")


def peak_bytes() -> int:
    """Largest resident set in bytes since `reset_peak`, or since the process began."""
    try:
        # Not ru_maxrss, which a child process inherits from the parent that started it.
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text())[0])
    except (OSError, IndexError):
        # Kilobytes on Linux, bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Rank and number of processes from the launcher's environment variables; does not import torch."""

from __future__ import annotations

import os
import time

GRACE_SECONDS = 2.0
"""How long a failing process waits for the main process to print the error: the launcher ends all when one fails."""


def launched_rank() -> int:
    """Rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def launched_processes() -> int:
    """Number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def wait_for_error_message() -> None:
    """Give the main process time to print the error that all processes found."""
    time.sleep(GRACE_SECONDS)

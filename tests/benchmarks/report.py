"""What the benchmarks share: the JSON report at the end, and measuring in a new process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CHILD_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
}
"""One thread, and an allocator that returns freed memory to the system, so that resident sets can be compared."""


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the option ``--out``; `description` is the docstring of the benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write the results if ``--out`` was given."""
    if path is not None:
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def run_child(file: str, *arguments: str) -> Any:
    """Run a benchmark's own file in a new process; returns the last line it prints, which is JSON."""
    done = subprocess.run(
        [sys.executable, file, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **CHILD_ENVIRONMENT},
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])

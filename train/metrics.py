"""Metrics and progress of a run: metrics.jsonl, a progress bar or log lines, TensorBoard, experiment trackers."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from omnimem.files import atomic_write_text, explained_disk_errors
from omnimem.recipe import Recipe
from train.trackers import Trackers

METRICS_FILE = "metrics.jsonl"

log = logging.getLogger("omnimem.train")


class Metrics:
    """Metrics of a run, written by its main process; other ranks pass `active=False`.

    Progress is a bar on a terminal, and a line every ``train.logging_steps`` steps in a log file or pipe.

    Parameters
    ----------
    output_dir : Path
        Folder of ``metrics.jsonl`` and ``tensorboard/``.
    done : int
        Steps already done: lines of later steps, left by a killed run, are deleted.
    total : int
        Steps of the run.
    active : bool
        Whether this process reports.
    recipe : Recipe
        Names the trackers; they record it as the settings of the run.
    """

    def __init__(self, output_dir: Path, done: int, total: int, active: bool, recipe: Recipe) -> None:
        self._file = self._board = self._trackers = None
        self._active, self._done, self._total, self._every = active, done, total, recipe.train.logging_steps
        self._started = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not (active and sys.stderr.isatty()),
            dynamic_ncols=True,
            bar_format="train: {percentage:3.0f}%| {n}/{total} [{elapsed}<{remaining}{postfix}]",
        )
        if not active:
            return
        path = output_dir / METRICS_FILE
        atomic_write_text(path, "".join(_lines_up_to(path, done)))
        self._file = path.open("a", encoding="utf-8")
        if find_spec("tensorboard"):
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=done + 1)
        self._trackers = Trackers(recipe, output_dir)

    def log(self, record: dict[str, Any]) -> None:
        """Write one record, which must have a ``step``."""
        if self._file is None:
            return
        with explained_disk_errors(self._file.name):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._board is not None:
            for name, value in _scalars(record):
                self._board.add_scalar(name, value, record["step"])
        if self._trackers is not None:
            self._trackers.log(dict(_scalars(record)), record["step"])

    def progress(self, record: dict[str, Any]) -> None:
        """Show a finished step on the bar or as a log line."""
        step, retained = record["step"], record["retained"]
        loss = "not finite" if record["loss"] is None else format(record["loss"], ".3f")
        shown = (
            f"loss {loss} lr {record['learning_rate']:.1e} "
            f"retained {retained['visual']:.0f}v+{retained['audio']:.0f}a {record['tokens_per_second']:.0f} tokens/s "
            f"{record['peak_gib']:.2f} GiB"
        )
        if not self._bar.disable:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update()
        elif self._active and (step % self._every == 0 or step == self._total):
            left = (time.monotonic() - self._started) / (step - self._done) * (self._total - step)
            log.info("step %d/%d %s eta %s", step, self._total, shown, timedelta(seconds=round(left)))

    def close(self) -> None:
        """Flush and close all outputs."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._trackers is not None:
            self._trackers.close()


class TqdmLoggingHandler(logging.Handler):
    """Writes log lines above the progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line to stderr."""
        # One write for text and line end: another process writes to the same stream.
        tqdm.write(self.format(record) + "\n", file=sys.stderr, end="")


class DuplicateMessageFilter(logging.Filter):
    """Passes each message about media once: a clip is opened every epoch and would repeat its warnings."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        message = record.getMessage()
        new = record.name != "omnimem.media" or message not in self._seen
        self._seen.add(message)
        return new


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Complete lines of steps up to `step`; a killed run may have written later ones and half a line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except ValueError:
            break
    return lines


def _scalars(record: dict[str, Any], prefix: str = "train/") -> list[tuple[str, float]]:
    pairs = []
    for name, value in record.items():
        if isinstance(value, dict):
            pairs += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            pairs.append((prefix + name, value))
    return pairs

"""The result of a conversion: its summary, the manifest and the list of refused rows."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.manifest import BadRow
from omnimem.errors import OmniMemError
from omnimem.files import atomic_file


class Stream(NamedTuple):
    """What a row of the manifest streams; source rows with the same stream are merged."""

    media: str
    audio_path: str | None
    audio: bool


@dataclass
class Report:
    """Counts of a conversion, the refused rows as (place, reason), and notes for the summary."""

    out: Path
    root: Path
    rows: int = 0
    questions: int = 0
    read: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def refused_file(self) -> Path:
        """File that lists the refused rows, if there are any."""
        return self.out.with_suffix(".refused.jsonl")

    def lines(self) -> Iterator[str]:
        """The printed summary; its last line is the command to train."""
        yield (
            f"{self.out}: {self.rows} rows written ({self.questions} questions, from {self.read} source rows), "
            f"{len(self.refused)} refused"
        )
        if self.refused:
            place, reason = self.refused[0]
            yield f"refused rows and reasons: {self.refused_file}; the first: {place}: {reason}"
        for note, count in self.notes.items():
            yield f"{note}: {count}"
        words = [f"data.path={self.out}"]
        if self.root != Path(os.path.realpath(self.out.parent)):
            words.append(f"data.root={self.root}")
        yield f"train: accelerate launch train.py recipe=NAME {shlex.join(words)}"


def manifest_line(stream: Stream, questions: list[dict[str, Any]]) -> bytes:
    """One line of a manifest.

    Raises
    ------
    BadRow
        A text with a lone surrogate: an escape that JSON allows, or bytes that were not UTF-8.
    """
    row: dict[str, Any] = {"media": stream.media}
    if stream.audio_path is not None:
        row["audio_path"] = stream.audio_path
    if not stream.audio:
        row["audio"] = False
    row["questions"] = questions
    try:
        return json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("a text is not UTF-8; save the source in UTF-8") from error


def write(report: Report, streams: dict[Stream, list[dict[str, Any]]], sources: Sequence[str]) -> None:
    """Write the list of refused rows, then the manifest; each file is written completely or not at all.

    Raises
    ------
    OmniMemError
        No good row, or the files cannot be written.
    """
    if report.refused:
        with atomic_file(report.refused_file) as temporary, temporary.open("w", encoding="utf-8") as file:
            for place, reason in report.refused:
                file.write(json.dumps({"source": place, "reason": reason}, ensure_ascii=False) + "\n")
    else:
        with suppress(FileNotFoundError):
            report.refused_file.unlink()  # of an earlier conversion; its reasons are outdated
    if not streams:
        first = f"; the first: {report.refused[0][0]}: {report.refused[0][1]}" if report.refused else ""
        listed = f" (reasons in {report.refused_file})" if report.refused else ""
        raise OmniMemError(f"no good row among {report.read} in {', '.join(sources)}{listed}{first}")
    with atomic_file(report.out) as temporary, temporary.open("wb") as file:
        for stream, questions in streams.items():
            file.write(manifest_line(stream, questions) + b"\n")

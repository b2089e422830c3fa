"""Rows of a manifest with their questions, and the fingerprint by which a run recognises its data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MAX_QUESTION_TIME = 1e9
"""Upper limit of a question's `time` in seconds; catches milliseconds since 1970 and infinities."""


@dataclass(frozen=True)
class Question:
    """One question with its reference answer.

    Attributes
    ----------
    question, answer : str
    time : float or None
        Second of the stream at which the question is asked; None: at the end.
    rejected : str or None
        The worse answer of a preference pair. Nothing trains on it: there is no preference objective.
    """

    question: str
    answer: str
    time: float | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class Row:
    """One stream and its questions.

    Attributes
    ----------
    media : Path
        The clip.
    questions : tuple of Question
    audio : bool
        False ignores the audio track.
    line : int
        Line number in the manifest.
    name : str
        Path of `media` relative to the data root.
    audio_path : Path or None
        Audio file used instead of the audio track of `media`.
    """

    media: Path
    questions: tuple[Question, ...]
    audio: bool
    line: int
    name: str
    audio_path: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files the row reads: its media, then its audio file if it has one."""
        return (self.media,) if self.audio_path is None else (self.media, self.audio_path)

    def content(self) -> list[Any]:
        """The row's contribution to `manifest_fingerprint`."""
        content = [self.name, self.media.stat().st_size, self.audio, [_content(one) for one in self.questions]]
        if self.audio_path is not None:
            # Relative to the media, because a row does not know the data root.
            name = Path(os.path.relpath(self.audio_path, self.media.parent)).as_posix()
            content.append([name, self.audio_path.stat().st_size])
        return content


@dataclass(frozen=True)
class Manifest:
    """The usable rows, and one line of reason for each unusable one."""

    rows: list[Row]
    problems: list[str]


def rejected_answers(rows: Iterable[Row]) -> int:
    """Number of questions with a rejected answer, which nothing trains on."""
    return sum(question.rejected is not None for row in rows for question in row.questions)


def manifest_fingerprint(rows: Iterable[Row]) -> str:
    """SHA-256 of the rows in order: media name and size, audio on or off, audio file, questions.

    It does not depend on the data root or on blank lines: a copied data set has the same fingerprint.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.content(), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _content(question: Question) -> dict[str, Any]:
    """A question's contribution to the fingerprint; `rejected` counts only where it is given."""
    return {key: value for key, value in asdict(question).items() if key != "rejected" or value is not None}

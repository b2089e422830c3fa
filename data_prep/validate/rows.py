"""Rows of a manifest against what was found in their files: text left over, times, sound, duplicates.

Pure functions of rows and results; nothing is opened here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.manifest import Row
from data_prep.validate.findings import Finding
from data_prep.validate.journal import printable

PLACEHOLDER = re.compile(
    r"<\|?(?P<what>audio|sound|speech|video|image|img|vision)"
    r"(?:[_-]?(?:pad|bos|eos|start|end|token|placeholder|here|\d+))?\|?>",
    re.IGNORECASE,
)
"""What other projects put where media belong; here media come first, and these would be read as words."""

HEARD = ("audio", "sound", "speech")
LATE = 0.1  # seconds a question may be past the end: headers and durations are rounded
LINES = 10  # line numbers named in a sentence


@dataclass(frozen=True)
class _Stream:
    """A row and what is known about the file(s) it reads."""

    row: Row
    entries: tuple[dict[str, Any], ...]  # of the media, and of the sound where that is a file of its own

    @property
    def has_picture(self) -> bool:
        return self.entries[0]["picture"]

    @property
    def sound(self) -> str:
        """Of the file that is heard when audio is on: yes, silent or none."""
        return self.entries[-1]["sound"]

    @property
    def seconds(self) -> float:
        return max(entry["seconds"] or 0.0 for entry in self.entries)

    @property
    def content(self) -> tuple[str, ...]:
        """What the files hold, or where they are if they could not be read."""
        return tuple(entry["digest"] or entry["path"] for entry in self.entries)

    @property
    def usable(self) -> bool:
        return not any(finding["severity"] == "error" for entry in self.entries for finding in entry["findings"])


def check_rows(rows: list[Row], entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Check every row.

    Parameters
    ----------
    rows : list of Row
    entries : dict
        Result of `check_file` for each path (as `printable` writes it) the rows name.

    Returns
    -------
    dict
        ``findings``: code, severity, message, ``lines`` and ``media`` of each; ``sound``: rows by what they hear;
        ``usable``: rows that a run can train on; ``questions``.
    """
    streams = [_Stream(row, tuple(entries[printable(path)] for path in _files(row))) for row in rows]
    findings = []
    bad: set[int] = set()
    for stream in streams:
        for finding in _of_row(stream):
            findings.append(_record(finding, [stream.row]))
            if finding.severity == "error":
                bad.add(stream.row.line)
    findings += [_record(finding, group) for finding, group in _duplicates(streams)]
    kinds = [_heard(stream) for stream in streams]
    return {
        "findings": findings,
        "sound": {kind: kinds.count(kind) for kind in ("heard", "silent", "missing", "off", "none")},
        "usable": len(rows) - len(bad),
        "questions": sum(len(row.questions) for row in rows),
    }


def _files(row: Row) -> list[Path]:
    """The media of a row, and its sound where that is a file of its own."""
    return list(row.files)


def _record(finding: Finding, rows: list[Row]) -> dict[str, Any]:
    lines = sorted({row.line for row in rows})
    return {**finding.record(), "lines": lines, "media": rows[0].name}


def _heard(stream: _Stream) -> str:
    if stream.row.audio:
        return {"yes": "heard", "silent": "silent", "none": "missing"}[stream.sound]
    return "none" if stream.sound == "none" else "off"


def _of_row(stream: _Stream) -> Iterator[Finding]:
    if not stream.usable:
        broken = [f["message"] for entry in stream.entries for f in entry["findings"] if f["severity"] == "error"]
        yield Finding("unusable_media", broken[0])
    elif not stream.has_picture and not (stream.row.audio and stream.sound != "none"):
        yield Finding("nothing_to_read", "neither picture nor wanted sound")
    elif _heard(stream) == "missing":
        yield Finding("audio_without_sound", "audio is on, but the file has no sound")
    yield from _placeholders(stream)
    if stream.usable:
        yield from _late(stream)


def _placeholders(stream: _Stream) -> Iterator[Finding]:
    """Each placeholder once a row, wherever it stands."""
    texts = [text for q in stream.row.questions for text in (q.question, q.answer, q.rejected) if text]
    found = {match[0]: match["what"].lower() for text in texts for match in PLACEHOLDER.finditer(text)}
    sounds = stream.row.audio and stream.sound != "none"
    for token, what in sorted(found.items()):
        if stream.usable and not (sounds if what in HEARD else stream.has_picture):
            lacks = "sound" if what in HEARD else "picture"
            yield Finding("placeholder_without_media", f"{token} in the text, but the row has no {lacks}")
        else:
            yield Finding("placeholder", f"{token} is left in the text; media come first here, take it out")


def _late(stream: _Stream) -> Iterator[Finding]:
    late = [q.time for q in stream.row.questions if q.time is not None and q.time > stream.seconds + LATE]
    if late:
        many = f"{len(late)} questions, the last at {max(late):g} s, are" if len(late) > 1 else f"{late[0]:g} s is"
        yield Finding("time_past_end", f"{many} past the end of {stream.seconds:.1f} s: asked at the end")


def _duplicates(streams: list[_Stream]) -> Iterator[tuple[Finding, list[Row]]]:
    by_content: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    by_question: dict[tuple[Any, ...], list[tuple[Row, str]]] = defaultdict(list)
    for stream in streams:
        row = stream.row
        by_content[stream.content].append(row)
        for question in row.questions:
            # Without its sound the same clip may well have another answer.
            key = (stream.content, row.audio, question.time, _plain(question.question))
            by_question[key].append((row, question.answer))
    for rows in by_content.values():
        if len(rows) > 1:
            yield Finding("same_media", f"the same media in {len(rows)} rows{_lines(rows)}"), rows
    for (_, _, time, text), asked in by_question.items():
        if len(asked) == 1:
            continue
        rows = [row for row, _ in asked]
        when = "" if time is None else f" at {time:g} s"
        what = f"“{text[:80]}”{when}, {len(asked)} times{_lines(rows)}"
        answers = list(dict.fromkeys(_plain(answer) for _, answer in asked))
        if len(answers) > 1:
            differing = " and ".join(f"“{answer[:60]}”" for answer in answers[:2])
            yield Finding("conflicting_answers", f"{what}, with {len(answers)} answers: {differing}"), rows
        else:
            yield Finding("same_question", f"{what}, with the same answer"), rows


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _lines(rows: list[Row]) -> str:
    lines = sorted({row.line for row in rows})
    if len(lines) == 1:
        return f" in line {lines[0]}"
    more = ", …" if len(lines) > LINES else ""
    return f" (lines {', '.join(str(line) for line in lines[:LINES])}{more})"

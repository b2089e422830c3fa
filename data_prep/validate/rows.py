"""Check the rows of a manifest against the results of their files: placeholders, times, audio, duplicates.

Pure functions; no file is opened here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.manifest import Row
from data_prep.validate.findings import Finding
from data_prep.validate.journal import printable

PLACEHOLDER = re.compile(
    r"<\|?(?P<what>audio|sound|speech|video|image|img|vision)"
    r"(?:[_-]?(?:pad|bos|eos|start|end|token|placeholder|here|\d+))?\|?>",
    re.IGNORECASE,
)
"""Media placeholders of other projects. Here media precede the text, so placeholders would be read as words."""

AUDIO_WORDS = ("audio", "sound", "speech")
LATE = 0.1  # seconds a question may be past the end: headers and durations are rounded
MAX_LINES = 10  # line numbers listed in a message


@dataclass(frozen=True)
class _Stream:
    """A row and the results of its files."""

    row: Row
    entries: tuple[dict[str, Any], ...]  # of the media, then of a separate audio file

    @property
    def has_video(self) -> bool:
        return self.entries[0]["has_video"]

    @property
    def audio(self) -> str:
        """Audio of the file whose audio is used: present, silent or none."""
        return self.entries[-1]["audio"]

    @property
    def seconds(self) -> float:
        return max(entry["seconds"] or 0.0 for entry in self.entries)

    @property
    def content(self) -> tuple[str, ...]:
        """Digests of the files, or their paths if they could not be read."""
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
        Result of `check_file` by `printable` path.

    Returns
    -------
    dict
        ``findings``: code, severity, message, ``lines`` and ``media`` of each; ``audio``: number of rows by audio use
        (`_audio_use`); ``usable``: number of rows a run can train on; ``questions``: their number.
    """
    streams = [_Stream(row, tuple(entries[printable(path)] for path in row.files)) for row in rows]
    findings = []
    bad: set[int] = set()
    for stream in streams:
        for finding in _check_row(stream):
            findings.append(_record(finding, [stream.row]))
            if finding.severity == "error":
                bad.add(stream.row.line)
    findings += [_record(finding, group) for finding, group in _duplicates(streams)]
    kinds = [_audio_use(stream) for stream in streams]
    return {
        "findings": findings,
        "audio": {kind: kinds.count(kind) for kind in ("used", "silent", "missing", "ignored", "none")},
        "usable": len(rows) - len(bad),
        "questions": sum(len(row.questions) for row in rows),
    }


def _record(finding: Finding, rows: list[Row]) -> dict[str, Any]:
    lines = sorted({row.line for row in rows})
    return {**finding.record(), "lines": lines, "media": rows[0].name}


def _audio_use(stream: _Stream) -> str:
    """Audio on: used, silent (track of zeros) or missing. Audio off: ignored, or none if there is no audio track."""
    if stream.row.audio:
        return {"present": "used", "silent": "silent", "none": "missing"}[stream.audio]
    return "none" if stream.audio == "none" else "ignored"


def _check_row(stream: _Stream) -> Iterator[Finding]:
    if not stream.usable:
        broken = [f["message"] for entry in stream.entries for f in entry["findings"] if f["severity"] == "error"]
        yield Finding("unusable_media", broken[0])
    elif not stream.has_video and not (stream.row.audio and stream.audio != "none"):
        yield Finding("nothing_to_use", "neither video nor usable audio")
    elif _audio_use(stream) == "missing":
        yield Finding("audio_missing", "audio is on, but the file has no audio track")
    yield from _placeholders(stream)
    if stream.usable:
        yield from _late(stream)


def _placeholders(stream: _Stream) -> Iterator[Finding]:
    """Every placeholder in the texts of a row, each reported once."""
    texts = [text for q in stream.row.questions for text in (q.question, q.answer, q.rejected) if text]
    found = {match[0]: match["what"].lower() for text in texts for match in PLACEHOLDER.finditer(text)}
    has_audio = stream.row.audio and stream.audio != "none"
    for token, what in sorted(found.items()):
        if stream.usable and not (has_audio if what in AUDIO_WORDS else stream.has_video):
            lacks = "audio" if what in AUDIO_WORDS else "video"
            yield Finding("placeholder_without_media", f"{token} in the text, but the row has no {lacks}")
        else:
            yield Finding("placeholder", f"{token} is left in the text; remove it, media precede the text")


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
            # The same clip without audio may have another answer.
            key = (stream.content, row.audio, question.time, _plain(question.question))
            by_question[key].append((row, question.answer))
    for rows in by_content.values():
        if len(rows) > 1:
            yield Finding("duplicate_media", f"the same media in {len(rows)} rows{_lines(rows)}"), rows
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
            yield Finding("duplicate_question", f"{what}, with the same answer"), rows


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _lines(rows: list[Row]) -> str:
    lines = sorted({row.line for row in rows})
    if len(lines) == 1:
        return f" in line {lines[0]}"
    more = ", …" if len(lines) > MAX_LINES else ""
    return f" (lines {', '.join(str(line) for line in lines[:MAX_LINES])}{more})"

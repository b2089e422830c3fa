"""Read and check one row of a manifest: keys, types, texts, and that its files lie inside the data root.

row = read_row(b'{"media": "clip.mp4", "question": "Who?", "answer": "Ada."}', 1, Path("clips"))
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

from data_prep.manifest.rows import MAX_QUESTION_TIME, Question, Row

QUESTION_KEYS = ("question", "answer", "time", "rejected")
ROW_KEYS = ("media", "audio_path", "audio", "questions", *QUESTION_KEYS)


class BadRow(Exception):
    """Why a row cannot be used, without file and line."""


def read_row(line: bytes, number: int, root: Path) -> Row:
    """Read and check one line of a manifest.

    Parameters
    ----------
    line : bytes
        One JSON object.
    number : int
        Line number in the manifest.
    root : Path
        The data root, as an absolute path without symbolic links.

    Raises
    ------
    BadRow
        The reason why the row cannot be used.
    """
    row = _decode(line)
    _check_keys(row, ROW_KEYS)
    media = find_media(row.get("media"), root)
    audio_path = None if row.get("audio_path") is None else find_media(row["audio_path"], root, "audio_path")
    audio = row.get("audio", True)
    if not isinstance(audio, bool):
        raise BadRow(f"audio must be true or false, got {audio!r}")
    if audio_path is not None and not audio:
        raise BadRow("both audio_path and audio=false; leave one of them out")
    if audio_path == media:
        raise BadRow("audio_path is the media file itself, whose audio is used anyway; leave audio_path out")
    if "questions" not in row:
        if not {"question", "answer"} & set(row):
            raise BadRow("no questions; give question and answer, or a list of them in questions")
        questions = [{key: row[key] for key in QUESTION_KEYS if key in row}]
    elif both := [key for key in QUESTION_KEYS if key in row]:
        raise BadRow(f"both questions and {both[0]}; put everything into questions")
    else:
        questions = row["questions"]
    if not isinstance(questions, list) or not questions:
        raise BadRow("questions must be a list of at least one question")
    parsed = tuple(_read_question(entry) for entry in questions)
    return Row(media, parsed, audio, number, media.relative_to(root).as_posix(), audio_path)


def find_media(media: Any, root: Path, key: str = "media") -> Path:
    """Return the absolute path of a file that lies inside `root` after symbolic links and `..` are resolved.

    Raises
    ------
    BadRow
        The file lies outside, is missing, empty, not a regular file, or not readable; `key` begins the message.
    """
    if media is None:
        raise BadRow(f"no {key}; give the path of the clip")
    if not isinstance(media, str) or not media.strip():
        raise BadRow(f"{key} must be a path, got {short(media)}")
    try:
        path = Path(os.path.realpath(root / media))
    except ValueError as error:  # a NUL character, or a lone surrogate
        raise BadRow(f"{key} must be a path, got {short(media)}") from error
    if not path.is_relative_to(root):
        raise BadRow(f"{key} {short(media)} lies outside {root}; the data root (data.root, --root) must hold all media")
    try:
        size = path.stat().st_size
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        reason = f"does not exist in {root}" if missing else f"cannot be read: {error.strerror}"
        raise BadRow(f"{key} {short(media)} {reason}") from error
    if not path.is_file():
        raise BadRow(f"{key} {short(media)} is not a file")
    if size == 0:
        raise BadRow(f"{key} {short(media)} is an empty file")
    if not os.access(path, os.R_OK):
        raise BadRow(f"{key} {short(media)} cannot be read: permission denied")
    return path


def short(value: Any) -> str:
    """A value of a data file for an error message: one line of at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)  # columns of Parquet hold dates and bytes
    return text if len(text) <= 80 else text[:77] + "..."


def _decode(line: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):  # JSON keeps the last of two equal keys, which would silently drop an answer
            raise BadRow("the same key is given twice")
        return row

    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=unique)
        # A lone surrogate escape is valid JSON but fails later, in a path or in the tokenizer.
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"not valid JSON: {error.msg} at column {error.colno} (one object per line)") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not a row: {error}") from error
    if not isinstance(row, dict):
        raise BadRow(f"a row is an object with media and questions, got {short(row)}")
    return row


def _check_keys(entry: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"rename or remove it; known keys: {', '.join(known)}"
            raise BadRow(f"unknown key {short(key)}; {hint}")


def _read_question(entry: Any) -> Question:
    if not isinstance(entry, dict):
        raise BadRow(f"a question is an object with question and answer, got {short(entry)}")
    _check_keys(entry, QUESTION_KEYS)
    for key in ("question", "answer"):
        text = entry.get(key)
        if not isinstance(text, str) or not text.strip():
            raise BadRow(f"{key} must be text that is not empty, got {short(text)}")
    time = entry.get("time")
    if time is not None:
        number = isinstance(time, int | float) and not isinstance(time, bool)
        if not number or not 0 <= time < MAX_QUESTION_TIME:  # NaN, which Python's JSON reads, fails the comparison
            raise BadRow(f"time must be seconds from the start, at least 0, or null; got {short(time)}")
        time = float(time)
    rejected = entry.get("rejected")
    if rejected is not None:
        if not isinstance(rejected, str) or not rejected.strip():
            raise BadRow(f"rejected must be text that is not empty, or null; got {short(rejected)}")
        if rejected.strip() == entry["answer"].strip():
            raise BadRow("rejected is the same as answer; a preference needs two different answers")
    return Question(entry["question"], entry["answer"], time, rejected)

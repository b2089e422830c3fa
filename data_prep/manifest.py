"""The manifest: a JSON Lines file, one stream a line, with the questions asked about it; or the same rows as Parquet.

    {"media": "clip.mp4", "questions": [{"question": "Who speaks?", "answer": "A pilot.", "time": 12.5}]}
    {"media": "silent.mp4", "question": "What colour is the car?", "answer": "Red.", "audio": false}
    {"media": "talk.mp4", "sound": "talk.wav", "question": "Who?", "answer": "Ada.", "rejected": "A man."}

`time` is the second of the stream at which the question is asked; null or absent: at its end. `audio` false: its
sound is not heard; `sound`: a file that is heard instead of it. `rejected` is the worse answer of a preference
pair: it is read and checked, but nothing trains on it, because there is no preference objective. `omnimem data convert`
writes manifests from the formats of other projects.

Every row is checked before training starts, because a missing clip is better found now than after six hours.
Media is looked at on disk only, not decoded. Parquet (one file, or a folder of shards, read by `datasets` as a
stream) has columns of the same names; an empty cell is an absent key.

Try it: `python train.py recipe=quickstart data.path=my.jsonl dry_run=true`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omnimem.errors import OmniMemError

QUICKSTART = Path(__file__).resolve().parent / "quickstart" / "quickstart.jsonl"
"""The clips and questions that ship with the package."""

LONGEST = 1e9  # seconds; beyond any stream, it catches milliseconds since 1970 and infinities

ASKED = ("question", "answer", "time", "rejected")  # keys of a question

log = logging.getLogger("omnimem.data")


@dataclass(frozen=True)
class Question:
    """One question; `time` is the second of the stream at which it is asked, None for its end.

    `rejected` is an answer known to be worse. Nothing trains on it: there is no preference objective.
    """

    question: str
    answer: str
    time: float | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class Row:
    """One stream; `name` is the media path relative to the root, `line` its line in the manifest.

    `sound` is a file that is heard along with the pictures of `media`, instead of its own sound.
    """

    media: Path
    questions: tuple[Question, ...]
    audio: bool
    line: int
    name: str
    sound: Path | None = None

    def content(self) -> list[Any]:
        """What the row adds to the fingerprint of a manifest."""
        content = [self.name, self.media.stat().st_size, self.audio, [_content(one) for one in self.questions]]
        if self.sound is not None:
            # Seen from the media, because a row does not know its root.
            name = Path(os.path.relpath(self.sound, self.media.parent)).as_posix()
            content.append([name, self.sound.stat().st_size])
        return content


@dataclass(frozen=True)
class Manifest:
    """The rows that can be used, and one line of reason for each that cannot."""

    rows: list[Row]
    problems: list[str]


class BadRow(Exception):
    """Why a row cannot be used, without file and line."""


def read_manifest(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, on_bad_row: str = "error"
) -> Manifest:
    """Read and check a manifest.

    Parameters
    ----------
    path : path
        The manifest (JSON Lines; Parquet file or folder), or `quickstart`: the clips that ship with the package.
    root : path, optional
        Folder that media paths are relative to and may not leave; the manifest's folder if not given.
    on_bad_row : {"error", "skip"}
        Refuse the manifest, or leave the row out, log why and say so in `Manifest.problems`.

    Raises
    ------
    OmniMemError
        A bad row under "error"; no good row; no such manifest or root.
    """
    file = _manifest_file(path)
    folder = media_root(path, root)
    if not folder.is_dir():
        raise OmniMemError(f"{root or file.parent}: not a folder; data.root is where the media of {file} lie")
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            rows.append(read_row(line, number, folder))
        except BadRow as reason:
            problems.append(f"{file}:{number}: {reason}")

    if problems and on_bad_row == "error":
        more = f"; {len(problems) - 1} more bad rows" if len(problems) > 1 else ""
        raise OmniMemError(f"{problems[0]}{more} (data.on_bad_row=skip leaves bad rows out)")
    for problem in problems:
        log.warning("row skipped: %s", problem)
    if not rows:
        found = f"; {len(problems)} bad, the first: {problems[0]}" if problems else ", the file is empty"
        raise OmniMemError(f"manifest {file} has no row to train on{found}")
    return Manifest(rows, problems)


def _lines(file: Path) -> Iterable[bytes]:
    """Rows as JSON, one after the other."""
    shards = sorted(file.glob("*.parquet")) if file.is_dir() else [file]
    if file.is_dir() and not shards:
        raise OmniMemError(f"manifest {file}: a folder without *.parquet; give a JSON Lines file or a folder of shards")
    if shards[0].suffix == ".parquet":
        return _parquet_lines(file, shards)
    try:
        return file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise OmniMemError(f"manifest {file}: {error.strerror}") from error


def _parquet_lines(file: Path, shards: list[Path]) -> Iterator[bytes]:
    from datasets import load_dataset

    try:
        stream = load_dataset("parquet", data_files=[str(shard) for shard in shards], split="train", streaming=True)
        for row in stream:
            yield json.dumps(filled(row), ensure_ascii=False, default=str).encode()
    except (OSError, ValueError) as error:  # what pyarrow and datasets raise
        raise OmniMemError(
            f"manifest {file}: not readable as Parquet ({' '.join(str(error).split())[:200]})"
        ) from error


def filled(value: Any) -> Any:
    """Without the keys that have no value: a column is there for every row."""
    if isinstance(value, dict):
        return {key: filled(one) for key, one in value.items() if one is not None}
    return [filled(one) for one in value] if isinstance(value, list) else value


def media_root(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Path:
    """Folder that the media of a manifest are relative to (see `read_manifest`)."""
    return Path(os.path.realpath(_manifest_file(path).parent if root is None else root))


def _manifest_file(path: str | os.PathLike[str]) -> Path:
    return QUICKSTART if os.fspath(path) == "quickstart" else Path(path)


def rejected_answers(rows: Iterable[Row]) -> int:
    """How many questions have a rejected answer, which nothing trains on."""
    return sum(question.rejected is not None for row in rows for question in row.questions)


def manifest_fingerprint(rows: Iterable[Row]) -> str:
    """Return a SHA-256 over what the rows hold, in order: media name and size, sound on or off, questions.

    It does not depend on where the data lies or on blank lines: a copied data set has the same fingerprint.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.content(), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _content(question: Question) -> dict[str, Any]:
    """What a question adds to the fingerprint; what came later counts only where it is given."""
    return {key: value for key, value in asdict(question).items() if key != "rejected" or value is not None}


def read_row(line: bytes, number: int, root: Path) -> Row:
    """Read and check one line of a manifest whose media lie below `root`, a folder without links in its path.

    Raises
    ------
    BadRow
        Why it cannot be used.
    """
    row = _decode(line)
    _check_keys(row, ("media", "sound", "audio", "questions", *ASKED))
    media = find_media(row.get("media"), root)
    sound = None if row.get("sound") is None else find_media(row["sound"], root, "sound")
    audio = row.get("audio", True)
    if not isinstance(audio, bool):
        raise BadRow(f"audio must be true or false, got {audio!r}")
    if sound is not None and not audio:
        raise BadRow("both sound and audio false; leave one of them out")
    if sound == media:
        raise BadRow("sound is the media file itself, which is heard anyway; leave sound out")
    if "questions" not in row:
        if not {"question", "answer"} & set(row):
            raise BadRow("no questions; give question and answer, or a list of them in questions")
        questions = [{key: row[key] for key in ASKED if key in row}]
    elif both := [key for key in ASKED if key in row]:
        raise BadRow(f"both questions and {both[0]}; put everything into questions")
    else:
        questions = row["questions"]
    if not isinstance(questions, list) or not questions:
        raise BadRow("questions must be a list of at least one question")
    parsed = tuple(_read_question(entry) for entry in questions)
    return Row(media, parsed, audio, number, media.relative_to(root).as_posix(), sound)


def _decode(line: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):  # JSON lets the last one win, and an answer would vanish without a word
            raise BadRow("the same key is given twice")
        return row

    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=unique)
        # A lone surrogate escape is valid JSON and breaks later, in a path or in the tokenizer.
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"not valid JSON: {error.msg} at column {error.colno} (one object a line)") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not a row: {error}") from error
    if not isinstance(row, dict):
        raise BadRow(f"a row is an object with media and questions, got {short(row)}")
    return row


def _check_keys(entry: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise BadRow(f"unknown key {short(key)}; {hint}")


def find_media(media: Any, root: Path, key: str = "media") -> Path:
    """Return the absolute path of a file that lies inside `root` once links and `..` are followed.

    Raises
    ------
    BadRow
        It lies elsewhere, is missing, empty, not a file, or not ours to read; `key` opens the reason.
    """
    if media is None:
        raise BadRow(f"no {key}; give the path of the clip")
    if not isinstance(media, str) or not media.strip():
        raise BadRow(f"{key} must be a path, got {short(media)}")
    try:
        path = Path(os.path.realpath(root / media))
    except ValueError as error:  # a zero character, or half a character pair
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


def _read_question(entry: Any) -> Question:
    if not isinstance(entry, dict):
        raise BadRow(f"a question is an object with question and answer, got {short(entry)}")
    _check_keys(entry, ASKED)
    for key in ("question", "answer"):
        text = entry.get(key)
        if not isinstance(text, str) or not text.strip():
            raise BadRow(f"{key} must be text that is not empty, got {short(text)}")
    time = entry.get("time")
    if time is not None:
        number = isinstance(time, int | float) and not isinstance(time, bool)
        if not number or not 0 <= time < LONGEST:  # NaN, which Python's JSON reads, fails the comparison
            raise BadRow(f"time must be seconds from the start, at least 0, or null; got {short(time)}")
        time = float(time)
    rejected = entry.get("rejected")
    if rejected is not None:
        if not isinstance(rejected, str) or not rejected.strip():
            raise BadRow(f"rejected must be text that is not empty, or null; got {short(rejected)}")
        if rejected.strip() == entry["answer"].strip():
            raise BadRow("rejected is the same as answer; a preference needs two different answers")
    return Question(entry["question"], entry["answer"], time, rejected)


def short(value: Any) -> str:
    """Show a value of the file in an error line: in one line, and not all of a novel."""
    text = json.dumps(value, ensure_ascii=False, default=str)  # columns of Parquet hold dates and bytes
    return text if len(text) <= 80 else text[:77] + "..."

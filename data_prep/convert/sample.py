"""What every format is read into: one stream as its source names it, and the questions about it.

python -m pytest tests/data_prep/test_convert.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.manifest import BadRow, short

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")

# What the summary counts, because the row was read but not taken word by word.
TURNS = "conversations of several turns, whose questions are each asked on their own about the whole stream"
SYSTEM = "system turns left out, as the model keeps its own"
HISTORY = "turns left out because their source marks them as not learned"
TRUTH = "ground truths left out for the chosen answer"
FROM_ZERO = "answers given as a number, counted from 0 (--answers index1 counts from 1)"
REJECTED = "rejected answers, which are kept but not trained on"
MUTE = "videos whose sound the source does not ask for (--audio on lets it be heard)"


@dataclass(frozen=True)
class ConvertedQuestion:
    """A question, its answer, the rejected answer of a preference pair, and the second at which it is asked."""

    question: str
    answer: str
    rejected: str | None = None
    time: float | None = None


@dataclass(frozen=True)
class Sample:
    """One row of a source.

    Attributes
    ----------
    video : str or None
        Path as the source has it; None: only sound.
    sound : str or None
        A sound file: heard along with the video, or alone.
    audio : bool
        Whether the video is heard at all.
    questions : tuple of Asked
    notes : tuple of str
        What was done to the row, for the summary.
    """

    video: str | None
    sound: str | None
    audio: bool
    questions: tuple[ConvertedQuestion, ...]
    notes: tuple[str, ...] = ()


def listed(value: Any) -> list[Any]:
    """A list of media as it is, one medium as a list, nothing as none."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def media_path(entry: Any, kind: str) -> str:
    """Return the path of one medium: text, or an object with `path` as data sets store files.

    Raises
    ------
    BadRow
        A URL, content without a file, a list of pictures, a part of a file, or no path at all.
    """
    if isinstance(entry, Mapping):
        refuse_segment(entry, kind)
        if entry.get("bytes") is not None and not entry.get("path"):
            raise BadRow(f"the {kind} is in the data set itself, not in a file; save it as a file and name its path")
        entry = next((entry[key] for key in ("path", "url", kind) if entry.get(key)), None)
    if isinstance(entry, list):
        raise BadRow(f"the {kind} is a list of pictures; only files are read")
    if not isinstance(entry, str) or not entry.strip():
        raise BadRow(f"{kind} must be a path, got {short(entry)}")
    entry = entry.strip().removeprefix("file://")
    if URL.match(entry):
        raise BadRow(f"{kind} {short(entry)} is a URL; download it and name the file")
    return entry


def one_stream(
    videos: list[Any], audios: list[Any], own_sound: bool
) -> tuple[str | None, str | None, bool, tuple[str, ...]]:
    """Say what is watched and heard: `video`, `sound`, `audio` and `notes` of a sample.

    Parameters
    ----------
    videos, audios : list
        Entries for `media_path`.
    own_sound : bool
        Whether the source wants the sound that is in the video itself.

    Raises
    ------
    BadRow
        More than one stream, or none.
    """
    for kind, entries in (("video", videos), ("audio", audios)):
        if len(entries) > 1:
            raise BadRow(f"{len(entries)} {kind} files; a row is one stream, split it or join the files")
    if not videos and not audios:
        raise BadRow("no video and no audio; a row needs a stream to ask about")
    video = media_path(videos[0], "video") if videos else None
    sound = media_path(audios[0], "audio") if audios else None
    audio = sound is not None or own_sound
    return video, sound, audio, () if audio else (MUTE,)


def refuse_segment(row: Mapping[str, Any], kind: str) -> None:
    """Raise BadRow when only a part of the file is meant: a stream is a whole file."""
    for start, end in (("start", "end"), ("video_start", "video_end"), ("start_time", "end_time")):
        if row.get(start) or row.get(end) is not None:
            what = f"{short(row.get(start) or 0)} to {short(row.get(end))}"
            raise BadRow(f"only {what} of the {kind} is meant; cut it out first (ffmpeg -ss … -to …)")
    if row.get("timestamps") is not None:
        raise BadRow(f"only {short(row['timestamps'])} of the {kind} is meant; cut it out first (ffmpeg -ss … -to …)")


def refuse_others(row: Mapping[str, Any]) -> None:
    """Raise BadRow for rows that hold, or mean, what a manifest cannot say."""
    refuse_segment(row, "video")
    for key in ("image", "images"):
        if listed(row.get(key)):
            raise BadRow(f"it has {key}; only video and sound are read")
    if row.get("tools"):
        raise BadRow("it has tools; only questions and answers are read")
    for key in ("label", "kto_tag"):
        if row.get(key) is False:
            raise BadRow(f"{key} is false: the answer is a bad one, and nothing says what a good one is")
        if row.get(key) not in (None, True):
            raise BadRow(f"{key} is {short(row[key])}: rows for classification are not read")

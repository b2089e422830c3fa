"""The common form of a source row: one stream, as the source names it, and its questions.

path = media_path({"path": "clip.mp4"}, "video")
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.manifest import BadRow, short

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")

# Notes for the summary: how a row was changed when it was read.
TURNS = "conversations of several turns, each of whose questions is asked separately about the whole stream"
SYSTEM = "system turns ignored: the model uses its own system prompt"
HISTORY = "turns skipped because their source excludes them from the loss"
TRUTH = "ground truth answers skipped: the chosen answer is used"
FROM_ZERO = "answers given as a number, counted from 0 (--answers index1 counts from 1)"
REJECTED = "rejected answers, copied to the manifest but not trained on"
MUTED = "videos whose audio the source does not use (--audio on uses it)"


@dataclass(frozen=True)
class ConvertedQuestion:
    """A question, its answer, the rejected answer of a preference pair, and the second at which to ask it."""

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
        Path as in the source; None: audio only.
    audio_path : str or None
        An audio file: used instead of the video's own audio, or alone.
    use_audio : bool
        Whether audio is used at all.
    questions : tuple of ConvertedQuestion
    notes : tuple of str
        How the row was changed, for the summary.
    """

    video: str | None
    audio_path: str | None
    use_audio: bool
    questions: tuple[ConvertedQuestion, ...]
    notes: tuple[str, ...] = ()


def as_list(value: Any) -> list[Any]:
    """A list unchanged, a single value as a list of one, an empty value as an empty list."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def media_path(entry: Any, kind: str) -> str:
    """Return the path of one media file, given as text or as an object with `path` (as `datasets` stores files).

    Raises
    ------
    BadRow
        A URL, embedded content without a file, a list of images, a segment of a file, or no path.
    """
    if isinstance(entry, Mapping):
        refuse_segment(entry, kind)
        if entry.get("bytes") is not None and not entry.get("path"):
            raise BadRow(f"the {kind} is embedded in the data set; save it as a file and give its path")
        entry = next((entry[key] for key in ("path", "url", kind) if entry.get(key)), None)
    if isinstance(entry, list):
        raise BadRow(f"the {kind} is a list of images; encode them as one video file")
    if not isinstance(entry, str) or not entry.strip():
        raise BadRow(f"{kind} must be a path, got {short(entry)}")
    entry = entry.strip().removeprefix("file://")
    if URL.match(entry):
        raise BadRow(f"{kind} {short(entry)} is a URL; download it and name the file")
    return entry


def one_stream(
    videos: list[Any], audios: list[Any], use_own_audio: bool
) -> tuple[str | None, str | None, bool, tuple[str, ...]]:
    """Return `video`, `audio_path`, `use_audio` and `notes` of a sample.

    Parameters
    ----------
    videos, audios : list
        Entries for `media_path`.
    use_own_audio : bool
        Whether the source uses the audio track of the video itself.

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
    audio_path = media_path(audios[0], "audio") if audios else None
    use_audio = audio_path is not None or use_own_audio
    return video, audio_path, use_audio, () if use_audio else (MUTED,)


def refuse_segment(row: Mapping[str, Any], kind: str) -> None:
    """Raise BadRow if the row refers to a segment of the file: a stream is a whole file."""
    for start, end in (("start", "end"), ("video_start", "video_end"), ("start_time", "end_time")):
        if row.get(start) or row.get(end) is not None:
            what = f"{short(row.get(start) or 0)} to {short(row.get(end))}"
            raise BadRow(f"the row uses only {what} of the {kind}; cut the segment first (ffmpeg -ss … -to …)")
    if row.get("timestamps") is not None:
        raise BadRow(
            f"the row uses only {short(row['timestamps'])} of the {kind}; cut the segment first (ffmpeg -ss … -to …)"
        )


def refuse_others(row: Mapping[str, Any]) -> None:
    """Raise BadRow for rows with content that a manifest cannot express."""
    refuse_segment(row, "video")
    for key in ("image", "images"):
        if as_list(row.get(key)):
            raise BadRow(f"it has {key}; only video and audio are read")
    if row.get("tools"):
        raise BadRow("it has tools; only questions and answers are read")
    for key in ("label", "kto_tag"):
        if row.get(key) is False:
            raise BadRow(f"{key} is false: the answer is marked as bad, and the row has no good one")
        if row.get(key) not in (None, True):
            raise BadRow(f"{key} is {short(row[key])}: rows for classification are not read")

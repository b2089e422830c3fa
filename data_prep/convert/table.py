"""Rows of a table, a CSV file or the columns of a data set: video, question, options, answer, time.

    video,question,options,answer,time
    a.mp4,What is seen?,A. a cat|B. a dog,B,00:01:30

Column names are looked for without case, by the names in COLUMNS. With options the question ends in their list
and the answer is a letter. A video is heard, unless a column `use_audio` says no: most tables do not say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from data_prep.manifest import BadRow, short

from .conversation import PLACEHOLDER, asked
from .options import Reading, answer_letter, read_options, with_options
from .sample import FROM_ZERO, Sample, listed, one_stream, refuse_others

COLUMNS = {
    "video": ("video", "video_path", "video_file", "media", "clip", "file_name", "filename", "path", "file"),
    "audio": ("audio", "audio_path", "sound"),
    "question": ("question", "prompt", "query", "instruction", "problem"),
    "options": ("options", "candidates", "choices"),
    "answer": ("answer", "gt", "correct_answer", "ground_truth", "response", "output"),
    "rejected": ("rejected", "reject"),
    "time": ("time", "timestamp", "time_stamp"),
    "use_audio": ("use_audio",),
}

# Options that have a column each.
BY_COLUMN = (tuple(f"option_{letter}" for letter in "abcdefgh"), tuple(f"option{n}" for n in range(1, 9)),
             tuple(f"a{n}" for n in range(8)), tuple("abcdefgh"))  # fmt: skip

CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:\.\d+)?)")


def has_columns(names: Iterable[str], least: int = 3) -> bool:
    """Whether there are columns for a stream, a question and an answer, or for so many of the three."""
    columns = {name.strip().lower() for name in names}
    found = {meaning for meaning, aliases in COLUMNS.items() if columns & set(aliases)}
    return bool(found & {"video", "audio"}) + ("question" in found) + ("answer" in found) >= least


def read(row: Mapping[str, Any], answers: Reading = "auto") -> Sample:
    """Read one row; `answers` says how answers name their option (see `answer_letter`).

    Raises
    ------
    BadRow
        Why it is refused.
    """
    cells = {str(key).strip().lower(): value for key, value in row.items() if not _empty(value)}
    refuse_others({key: value for key, value in cells.items() if key not in ("label", "tools")})
    found = {meaning: next((cells[name] for name in names if name in cells), None)
             for meaning, names in COLUMNS.items()}  # fmt: skip
    question, answer = found["question"], found["answer"]
    if isinstance(question, str):
        question = PLACEHOLDER.sub("", question)
    notes: tuple[str, ...] = ()
    options = read_options(found["options"] if found["options"] is not None else _by_column(cells))
    if options and isinstance(question, str) and question.strip() and answer is not None:
        answer, from_zero = answer_letter(answer, options, answers)
        question = with_options(question, options)
        notes = (FROM_ZERO,) if from_zero else ()
        if found["rejected"] is not None:
            found["rejected"], _ = answer_letter(found["rejected"], options, answers)
    elif isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer).removesuffix(".0")  # a column with gaps has floats for whole numbers
    entry = asked(question, answer, found["rejected"], seconds(found["time"]))
    own_sound = found["use_audio"] is None or _truth(found["use_audio"])
    video, sound, audio, more = one_stream(listed(found["video"]), listed(found["audio"]), own_sound)
    return Sample(video, sound, audio, (entry,), notes + more)


def seconds(value: Any) -> float | None:
    """Read a time: seconds, or `mm:ss` and `hh:mm:ss` with or without a fraction; empty: None.

    Raises
    ------
    BadRow
        Anything else.
    """
    if _empty(value):
        return None
    text = str(value).strip()
    if clock := CLOCK.fullmatch(text):
        hours, minutes, rest = int(clock[1] or 0), int(clock[2]), float(clock[3])
        if rest < 60 and (minutes < 60 or clock[1] is None):
            return hours * 3600 + minutes * 60 + rest
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not 0 <= number < math.inf:
        raise BadRow(f"time must be seconds, mm:ss or hh:mm:ss, got {short(str(value))}")
    return number


def _by_column(cells: Mapping[str, Any]) -> list[Any]:
    for names in BY_COLUMN:
        options = [cells[name] for name in names if name in cells]
        if len(options) > 1 and names[0] in cells:
            return options
    return []


def _truth(value: Any) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    truth = words.get(str(value).strip().lower())
    if truth is None:
        raise BadRow(f"use_audio must be true or false, got {short(str(value))}")
    return truth


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value != value  # NaN

"""Rows of a table (a CSV file, or the columns of a data set): video, question, options, answer, time.

    video,question,options,answer,time
    a.mp4,What is seen?,A. a cat|B. a dog,B,00:01:30

Column names are those in COLUMNS, in any case. With options, their list is appended to the question and the answer is a
letter. The audio of a video is used unless a column `use_audio` says no: most tables have no such column.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from data_prep.manifest import BadRow, short

from .conversation import PLACEHOLDER, make_question
from .options import AnswerForm, answer_letter, read_options, with_options
from .sample import FROM_ZERO, Sample, as_list, one_stream, refuse_others

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

# Names of option columns, for tables with one column per option.
OPTION_COLUMNS = (tuple(f"option_{letter}" for letter in "abcdefgh"), tuple(f"option{n}" for n in range(1, 9)),
             tuple(f"a{n}" for n in range(8)), tuple("abcdefgh"))  # fmt: skip

CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:\.\d+)?)")


def has_columns(names: Iterable[str], least: int = 3) -> bool:
    """Whether at least `least` of these three have a column: the stream, the question, the answer."""
    columns = {name.strip().lower() for name in names}
    found = {meaning for meaning, aliases in COLUMNS.items() if columns & set(aliases)}
    return bool(found & {"video", "audio"}) + ("question" in found) + ("answer" in found) >= least


def read(row: Mapping[str, Any], answers: AnswerForm = "auto") -> Sample:
    """Read one row; `answers` is how answers name their option (see `answer_letter`).

    Raises
    ------
    BadRow
        Why the row is refused.
    """
    cells = {str(key).strip().lower(): value for key, value in row.items() if not _empty(value)}
    refuse_others({key: value for key, value in cells.items() if key not in ("label", "tools")})
    found = {meaning: next((cells[name] for name in names if name in cells), None)
             for meaning, names in COLUMNS.items()}  # fmt: skip
    question, answer = found["question"], found["answer"]
    if isinstance(question, str):
        question = PLACEHOLDER.sub("", question)
    notes: tuple[str, ...] = ()
    options = read_options(found["options"] if found["options"] is not None else _options_by_column(cells))
    if options and isinstance(question, str) and question.strip() and answer is not None:
        answer, from_zero = answer_letter(answer, options, answers)
        question = with_options(question, options)
        notes = (FROM_ZERO,) if from_zero else ()
        if found["rejected"] is not None:
            found["rejected"], _ = answer_letter(found["rejected"], options, answers)
    elif isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer).removesuffix(".0")  # a numeric column with empty cells stores whole numbers as floats
    entry = make_question(question, answer, found["rejected"], seconds(found["time"]))
    use_own_audio = found["use_audio"] is None or _truth(found["use_audio"])
    video, audio_path, use_audio, more = one_stream(as_list(found["video"]), as_list(found["audio"]), use_own_audio)
    return Sample(video, audio_path, use_audio, (entry,), notes + more)


def seconds(value: Any) -> float | None:
    """Read a time: seconds, `mm:ss` or `hh:mm:ss`, with or without a fraction; None for an empty cell.

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


def _options_by_column(cells: Mapping[str, Any]) -> list[Any]:
    for names in OPTION_COLUMNS:
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

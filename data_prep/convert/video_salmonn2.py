r"""Rows of video-SALMONN 2 and 2+: `video` or `audio`, and `conversations`.

    {"video": "a.mp4", "use_audio": true, "conversations": [{"from": "human", "value": "<video>\nWhat?"}, …]}

The audio of the video is used if `use_audio` is true (default: false). If `audio` names a file, that file is used
instead. Preference rows add the turns `chosen` and `reject`, and `gpt` is then the ground truth; the older release has
`gpt` for the chosen answer, `reject_gpt` and `gt`, and writes `<image>` for a video or audio file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data_prep.manifest import BadRow, short

from .conversation import Media, check_placeholders, read_pairs, read_turns
from .sample import Sample, as_list, one_stream, refuse_others


def read(row: Mapping[str, Any]) -> Sample:
    """Read one row.

    Raises
    ------
    BadRow
        Why the row is refused.
    """
    refuse_others(row)
    use_audio = row.get("use_audio", False)
    if not isinstance(use_audio, bool):
        raise BadRow(f"use_audio must be true or false, got {short(use_audio)}")
    videos, audios = as_list(row.get("video")), as_list(row.get("audio"))
    turns = read_turns(row.get("conversations"), Media())
    kind = "<video>" if videos else "<audio>"
    turns = [replace(turn, text=turn.text.replace("<image>", kind)) for turn in turns]
    num_audio = len(audios)
    if videos:  # <video> includes the audio, wherever it is stored; an additional <audio> is allowed
        num_audio = min(sum(turn.text.count("<audio>") for turn in turns), max(num_audio, int(use_audio)))
    check_placeholders(turns, len(videos), num_audio)
    questions, notes = read_pairs(turns)
    video, audio_path, audio, more = one_stream(videos, audios, use_audio)
    return Sample(video, audio_path, audio, questions, notes + more)

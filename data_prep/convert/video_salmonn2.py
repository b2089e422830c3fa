r"""Rows of video-SALMONN 2 and 2+: `video` or `audio` beside `conversations`.

    {"video": "a.mp4", "use_audio": true, "conversations": [{"from": "human", "value": "<video>\nWhat?"}, …]}

The video is heard when `use_audio` is true (absent: not) or when `audio` names a file, which is heard instead.
Preference rows add turns `chosen` and `reject`, and `gpt` is then the ground truth; the older release has `gpt`
for the chosen answer, `reject_gpt` and `gt`, and writes `<image>` for whatever the row holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data_prep.manifest import BadRow, short

from .conversation import Media, check_placeholders, read_pairs, read_turns
from .sample import Sample, listed, one_stream, refuse_others


def read(row: Mapping[str, Any]) -> Sample:
    """Read one row.

    Raises
    ------
    BadRow
        Why it is refused.
    """
    refuse_others(row)
    use_audio = row.get("use_audio", False)
    if not isinstance(use_audio, bool):
        raise BadRow(f"use_audio must be true or false, got {short(use_audio)}")
    videos, audios = listed(row.get("video")), listed(row.get("audio"))
    turns = read_turns(row.get("conversations"), Media())
    kind = "<video>" if videos else "<audio>"
    turns = [replace(turn, text=turn.text.replace("<image>", kind)) for turn in turns]
    sounds = len(audios)
    if videos:  # <video> stands for its sound as well, whichever file that is in; <audio> may stand beside it
        sounds = min(sum(turn.text.count("<audio>") for turn in turns), max(sounds, int(use_audio)))
    check_placeholders(turns, len(videos), sounds)
    questions, notes = read_pairs(turns)
    video, sound, audio, more = one_stream(videos, audios, use_audio)
    return Sample(video, sound, audio, questions, notes + more)

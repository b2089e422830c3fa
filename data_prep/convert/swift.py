"""Rows of ms-swift: `messages`, or the older `query`, `response`, `history`; with `videos` and `audios`.

    {"messages": [{"role": "user", "content": "<video>What?"}, …], "videos": ["a.mp4"], "rejected_response": "…"}

Like rows of LLaMA-Factory, with two differences: media without any placeholder count as placed in front of the text,
and a preference pair is the last answer with `rejected_response` (or `rejected_messages`). ms-swift decides for a
whole run whether the audio of videos is used: pass `--audio on` for data sets that were used with audio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data_prep.manifest import BadRow

from . import sharegpt
from .conversation import Media, answer_turn, with_rejected
from .sample import Sample, as_list


def read(row: Mapping[str, Any]) -> Sample:
    """Read one row.

    Raises
    ------
    BadRow
        Why the row is refused.
    """
    if row.get("objects"):
        raise BadRow("it has objects (grounding); only questions and answers are read")
    for kind in ("videos", "audios"):
        other = row.get("rejected_" + kind)
        if other is not None and as_list(other) != as_list(row.get(kind)):
            raise BadRow(f"the rejected answer is about other {kind}; a row is one stream")
    sample = sharegpt.read(row, implied=True)
    rejected = row.get("rejected_response", row.get("rejected_messages"))
    if rejected is not None:
        rejected = answer_turn(rejected, Media()).text
    return replace(sample, questions=with_rejected(sample.questions, rejected))

"""Rows of LLaMA-Factory: `conversations` or `messages`, with lists `videos` and `audios`.

    {"messages": [{"role": "user", "content": "<video><audio>What?"}, …], "videos": ["a.mp4"], "audios": ["a.wav"]}

The text has one `<video>` or `<audio>` for each file in the lists. The audio of a video is used if there is an entry
in `audios`; the video file itself means its own audio track. A preference pair is given as `chosen` and `rejected`
outside the conversation. The Alpaca form (`instruction`, `input`, `output`, `history`) is read as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.manifest import BadRow, short

from .conversation import (
    Media,
    Turn,
    answer_turn,
    check_placeholders,
    read_pairs,
    read_turns,
    with_chosen,
    with_rejected,
)
from .sample import SYSTEM, Sample, as_list, one_stream, refuse_others


def read(row: Mapping[str, Any], implied: bool = False) -> Sample:
    """Read one row; `implied`: media without any placeholder count as placed in front of the text (ms-swift).

    Raises
    ------
    BadRow
        Why the row is refused.
    """
    refuse_others(row)
    media = Media(as_list(row.get("videos", row.get("video"))), as_list(row.get("audios", row.get("audio"))), image=[])
    turns = with_chosen(_turns(row, media), row.get("chosen"), media)
    rejected = row.get("rejected")
    if rejected is not None:
        rejected = answer_turn(rejected, media).text
    check_placeholders(turns, len(media.video), len(media.audio), implied)
    questions, notes = read_pairs(turns)
    video, audio_path, use_audio, more = one_stream(media.video, media.audio, use_own_audio=False)
    if row.get("system"):
        more += (SYSTEM,)
    return Sample(video, audio_path, use_audio, with_rejected(questions, rejected), notes + more)


def _turns(row: Mapping[str, Any], media: Media) -> list[Turn]:
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            return read_turns(row[key], media)
    if row.get("conversation") is not None:  # one object per question and answer
        return [turn for pair in as_list(row["conversation"]) for turn in _pair_of_turns(pair)]
    for question, answer in (("query", "response"), ("instruction", "output")):
        if row.get(question) is not None:
            text = "\n".join(str(row[key]) for key in (question, "input") if row.get(key))
            now = _pair_of_turns({"human": text, "assistant": row.get(answer)})
            return [turn for pair in as_list(row.get("history")) for turn in _pair_of_turns(pair)] + now
    raise BadRow(f"no conversation; the keys are {short(', '.join(map(str, row)))}")


def _pair_of_turns(pair: Any) -> list[Turn]:
    """The two turns of a pair: a list of two texts, or an object with human and assistant."""
    if isinstance(pair, Mapping):
        pair = [pair.get("human"), pair.get("assistant")]
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
        raise BadRow(f"a question and its answer are two texts, got {short(pair)}")
    # The answer may be missing: the chosen answer can be given outside the conversation.
    return [Turn("user", pair[0])] + ([Turn("assistant", str(pair[1]))] if pair[1] is not None else [])

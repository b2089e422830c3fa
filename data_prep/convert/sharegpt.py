"""Rows of LLaMA-Factory: `conversations` or `messages`, with lists `videos` and `audios`.

    {"messages": [{"role": "user", "content": "<video><audio>What?"}, …], "videos": ["a.mp4"], "audios": ["a.wav"]}

As many `<video>` and `<audio>` in the text as files in the lists. A video is heard when there is an audio entry:
the same file means its own sound. A preference pair is `chosen` and `rejected` beside the conversation. Its
alpaca form (`instruction`, `input`, `output`, `history`) is read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.manifest import BadRow, short

from .conversation import Media, Turn, answer_turn, check_placeholders, choose, read_pairs, read_turns, reject
from .sample import SYSTEM, Sample, listed, one_stream, refuse_others


def read(row: Mapping[str, Any], implied: bool = False) -> Sample:
    """Read one row; `implied`: media without any placeholder stand in front of the text (ms-swift).

    Raises
    ------
    BadRow
        Why it is refused.
    """
    refuse_others(row)
    media = Media(listed(row.get("videos", row.get("video"))), listed(row.get("audios", row.get("audio"))), image=[])
    turns = choose(_turns(row, media), row.get("chosen"), media)
    rejected = row.get("rejected")
    if rejected is not None:
        rejected = answer_turn(rejected, media).text
    check_placeholders(turns, len(media.video), len(media.audio), implied)
    questions, notes = read_pairs(turns)
    video, sound, audio, more = one_stream(media.video, media.audio, own_sound=False)
    if row.get("system"):
        more += (SYSTEM,)
    return Sample(video, sound, audio, reject(questions, rejected), notes + more)


def _turns(row: Mapping[str, Any], media: Media) -> list[Turn]:
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            return read_turns(row[key], media)
    if row.get("conversation") is not None:  # one object for both sides
        return [turn for pair in listed(row["conversation"]) for turn in _both(pair)]
    for question, answer in (("query", "response"), ("instruction", "output")):
        if row.get(question) is not None:
            text = "\n".join(str(row[key]) for key in (question, "input") if row.get(key))
            now = _both({"human": text, "assistant": row.get(answer)})
            return [turn for pair in listed(row.get("history")) for turn in _both(pair)] + now
    raise BadRow(f"no conversation; the keys are {short(', '.join(map(str, row)))}")


def _both(pair: Any) -> list[Turn]:
    """The two turns of a pair: a list of two texts, or an object with human and assistant."""
    if isinstance(pair, Mapping):
        pair = [pair.get("human"), pair.get("assistant")]
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
        raise BadRow(f"a question and its answer are two texts, got {short(pair)}")
    # Without an answer only the question stays: the better answer may be named beside it.
    return [Turn("user", pair[0])] + ([Turn("assistant", str(pair[1]))] if pair[1] is not None else [])

"""Conversations, which three formats share: turns by role, placeholders in their text, questions with answers.

Why: formats differ in how they name roles and media, not in what a turn is. Every pair of turns becomes a
question of its own, asked about the whole stream: the memory holds the stream, not the talk about it.

    python -m pytest tests/data_prep/test_convert.py -k conversation
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data_prep.manifest import BadRow, short

from .sample import HISTORY, SYSTEM, TRUTH, TURNS, ConvertedQuestion

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    # video-SALMONN 2, beside gpt: the pair, the ground truth, an answer that is read but not learned
    "chosen": "chosen",
    "reject": "rejected",
    "reject_gpt": "rejected",
    "gt": "truth",
    "history_gpt": "history",
}

PLACEHOLDER = re.compile(r"<(video|audio|image)>")
WITH_SPACE = re.compile(r"(?:\s*<(?:video|audio|image)>)+\s*")


@dataclass(frozen=True)
class Turn:
    """What one side says; `role` is one of the values of ROLES."""

    role: str
    text: str


@dataclass
class Media:
    """Entries for `media_path` by kind: of the row, then of content lists."""

    video: list[Any] = field(default_factory=list)
    audio: list[Any] = field(default_factory=list)
    image: list[Any] = field(default_factory=list)


def read_turns(value: Any, media: Media) -> list[Turn]:
    """Read a list of turns: `from` and `value`, or `role` and `content`; media in the content go to `media`.

    Raises
    ------
    BadRow
        Not turns, or a role that has no place in a question and answer.
    """
    if isinstance(value, Mapping) and all(isinstance(cells, list) for cells in value.values()):
        # A column of a data set: a list by key instead of an object by turn.
        value = [dict(zip(value, cells, strict=False)) for cells in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        raise BadRow(f"a conversation is a list of turns, got {short(value)}")
    return [read_turn(entry, media) for entry in value]


def read_turn(entry: Any, media: Media) -> Turn:
    """Read one turn (see `read_turns`)."""
    if not isinstance(entry, Mapping):
        raise BadRow(f"a turn is an object with from and value, or role and content; got {short(entry)}")
    name = entry.get("from", entry.get("role"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadRow(f"role {short(name)} has no place in a question and answer; known are {', '.join(ROLES)}")
    text = entry.get("value", entry.get("content"))
    if isinstance(text, list):
        text = "".join(_part(part, media) for part in text)
    if not isinstance(text, str):
        raise BadRow(f"the turn of {name} has no text, got {short(text)}")
    if role == "assistant" and entry.get("loss") in (False, 0):
        role = "history"
    return Turn(role, text)


def _part(part: Any, media: Media) -> str:
    """One part of a content list as text; a medium leaves a placeholder."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = kind.removesuffix("_url") if isinstance(kind, str) else kind
    if kind not in ("video", "audio", "image"):
        raise BadRow(f"a part of a turn is text, video or audio, got {short(part)}")
    entry = next((part[key] for key in (kind, f"{kind}_url", "path", "url") if part.get(key)), None)
    if entry is not None:
        getattr(media, kind).append(entry)
    return f"<{kind}>"


def check_placeholders(turns: list[Turn], video: int, audio: int, implied: bool = False) -> None:
    """Compare placeholders with media, kind by kind.

    Parameters
    ----------
    turns : list of Turn
    video, audio : int
        How many there are.
    implied : bool
        A format in which a medium without any placeholder stands in front of the text.

    Raises
    ------
    BadRow
        A placeholder without media, more media than placeholders, or one for an image.
    """
    asked = [kind for turn in turns if turn.role in ("user", "system") for kind in PLACEHOLDER.findall(turn.text)]
    if "image" in asked:
        raise BadRow("placeholder <image>; only video and sound are read")
    for kind, given in (("video", video), ("audio", audio)):
        count = asked.count(kind)
        if count > given:
            raise BadRow(f"placeholder without media: {count} <{kind}> in the text, {given} {kind} files")
        if count < given and not (implied and count == 0):
            raise BadRow(f"media without placeholder: {given} {kind} files, {count} <{kind}> in the text")


def read_pairs(turns: list[Turn]) -> tuple[tuple[ConvertedQuestion, ...], tuple[str, ...]]:
    """Return the questions of a conversation, without placeholders, and notes for the summary.

    The answer is `chosen` where there is one: then `assistant` is the ground truth of the same question.

    Raises
    ------
    BadRow
        A question without answer, an answer without question, or nothing to learn.
    """
    notes = []
    pairs: list[dict[str, str]] = []
    for turn in turns:
        if turn.role == "system":
            notes.append(SYSTEM)
        elif turn.role == "user":
            pairs.append({"user": _bare(turn.text)})
        elif not pairs:
            raise BadRow("an answer before the first question")
        elif turn.role in pairs[-1]:
            raise BadRow(f"two {turn.role} turns for one question")
        else:
            pairs[-1][turn.role] = turn.text
    questions = []
    for pair in pairs:
        if "history" in pair and "assistant" not in pair and "chosen" not in pair:
            notes.append(HISTORY)
            continue
        if {"chosen", "assistant"} <= set(pair) or "truth" in pair:
            notes.append(TRUTH)
        questions.append(asked(pair["user"], pair.get("chosen", pair.get("assistant")), pair.get("rejected")))
    if not questions:
        raise BadRow("no question with an answer in the conversation")
    if len(questions) > 1:
        notes.append(TURNS)
    return tuple(questions), tuple(notes)


def asked(question: Any, answer: Any, rejected: Any = None, time: float | None = None) -> ConvertedQuestion:
    """Check the texts of a question.

    Raises
    ------
    BadRow
        One of them is missing or empty, an answer holds a placeholder, or there is nothing to prefer.
    """
    if not isinstance(question, str) or not question.strip():
        raise BadRow("empty question")
    if answer is None:
        raise BadRow(f"question without answer: {short(question)}")
    if not isinstance(answer, str):
        raise BadRow(f"the answer to {short(question)} must be text, got {short(answer)}")
    if not answer.strip():
        raise BadRow(f"empty answer to {short(question)}")
    if rejected is not None:
        if not isinstance(rejected, str) or not rejected.strip():
            raise BadRow(f"empty rejected answer to {short(question)}")
        if rejected.strip() == answer.strip():
            raise BadRow(f"the rejected answer to {short(question)} is the same as the answer")
        rejected = rejected.strip()
    for text in (answer, rejected):
        if text is not None and (found := PLACEHOLDER.search(text)):  # the model would learn to write it
            raise BadRow(f"placeholder {found.group()} in an answer")
    return ConvertedQuestion(question.strip(), answer.strip(), rejected, time)


def reject(questions: tuple[ConvertedQuestion, ...], rejected: Any) -> tuple[ConvertedQuestion, ...]:
    """Set the worse answer of the last question, where a format names it beside the conversation."""
    if rejected is None:
        return questions
    last = questions[-1]
    return (*questions[:-1], asked(last.question, last.answer, rejected, last.time))


def choose(turns: list[Turn], chosen: Any, media: Media) -> list[Turn]:
    """Append the better answer, where a format names it beside the conversation: a turn, or its text."""
    if chosen is None:
        return turns
    return [*turns, replace(answer_turn(chosen, media), role="chosen")]


def answer_turn(value: Any, media: Media) -> Turn:
    """Read an answer that is a turn, or the list of one, or its text."""
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, str):
        return Turn("assistant", value)
    turn = read_turn(value, media)
    if turn.role != "assistant":
        raise BadRow(f"an answer by {turn.role}")
    return turn


def _bare(text: str) -> str:
    """Without placeholders and the line breaks that set them off."""
    return WITH_SPACE.sub(lambda found: "\n" if "\n" in found.group() else " ", text).strip()

"""Conversations, which three formats share: turns by role, placeholders in their text, questions with answers.

The formats differ in how they name roles and media, not in what a turn is. Each pair of turns becomes a separate
question about the whole stream: earlier turns are not part of the prompt.

    questions, notes = read_pairs(read_turns(row["conversations"], media))
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
    # video-SALMONN 2, in addition to gpt: preference pair, ground truth, an answer excluded from the loss
    "chosen": "chosen",
    "reject": "rejected",
    "reject_gpt": "rejected",
    "gt": "truth",
    "history_gpt": "history",
}

PLACEHOLDER = re.compile(r"<(video|audio|image)>")
PLACEHOLDERS_AND_SPACE = re.compile(r"(?:\s*<(?:video|audio|image)>)+\s*")


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; `role` is one of the values of ROLES."""

    role: str
    text: str


@dataclass
class Media:
    """Entries for `media_path` by kind: those of the row, then those in content lists."""

    video: list[Any] = field(default_factory=list)
    audio: list[Any] = field(default_factory=list)
    image: list[Any] = field(default_factory=list)


def read_turns(value: Any, media: Media) -> list[Turn]:
    """Read a list of turns: `from` and `value`, or `role` and `content`; media in the content are appended to `media`.

    Raises
    ------
    BadRow
        Not a list of turns, or an unknown role.
    """
    if isinstance(value, Mapping) and all(isinstance(cells, list) for cells in value.values()):
        # A column of a data set: a dict of lists instead of a list of dicts.
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
        raise BadRow(f"unknown role {short(name)}; known roles: {', '.join(ROLES)}")
    text = entry.get("value", entry.get("content"))
    if isinstance(text, list):
        text = "".join(_part(part, media) for part in text)
    if not isinstance(text, str):
        raise BadRow(f"the turn of {name} has no text, got {short(text)}")
    if role == "assistant" and entry.get("loss") in (False, 0):
        role = "history"
    return Turn(role, text)


def _part(part: Any, media: Media) -> str:
    """One part of a content list as text; a media part becomes a placeholder."""
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
    """Check that the text has one placeholder for each media file.

    Parameters
    ----------
    turns : list of Turn
    video, audio : int
        Number of video and audio files.
    implied : bool
        Whether media without any placeholder count as placed in front of the text.

    Raises
    ------
    BadRow
        A placeholder without media, more media than placeholders, or one for an image.
    """
    kinds = [kind for turn in turns if turn.role in ("user", "system") for kind in PLACEHOLDER.findall(turn.text)]
    if "image" in kinds:
        raise BadRow("placeholder <image>; only video and audio are read")
    for kind, given in (("video", video), ("audio", audio)):
        count = kinds.count(kind)
        if count > given:
            raise BadRow(f"placeholder without media: {count} <{kind}> in the text, {given} {kind} files")
        if count < given and not (implied and count == 0):
            raise BadRow(f"media without placeholder: {given} {kind} files, {count} <{kind}> in the text")


def read_pairs(turns: list[Turn]) -> tuple[tuple[ConvertedQuestion, ...], tuple[str, ...]]:
    """Return the questions of a conversation, without placeholders, and notes for the summary.

    The answer is the `chosen` turn if there is one; the `assistant` turn is then the ground truth.

    Raises
    ------
    BadRow
        A question without answer, an answer without question, or no question with an answer.
    """
    notes = []
    pairs: list[dict[str, str]] = []
    for turn in turns:
        if turn.role == "system":
            notes.append(SYSTEM)
        elif turn.role == "user":
            pairs.append({"user": _without_placeholders(turn.text)})
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
        questions.append(make_question(pair["user"], pair.get("chosen", pair.get("assistant")), pair.get("rejected")))
    if not questions:
        raise BadRow("no question with an answer in the conversation")
    if len(questions) > 1:
        notes.append(TURNS)
    return tuple(questions), tuple(notes)


def make_question(question: Any, answer: Any, rejected: Any = None, time: float | None = None) -> ConvertedQuestion:
    """Check the texts of a question and make a `ConvertedQuestion`.

    Raises
    ------
    BadRow
        A text is missing or empty, an answer contains a placeholder, or both answers are the same.
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
        if text is not None and (found := PLACEHOLDER.search(text)):  # the model would learn to generate it
            raise BadRow(f"placeholder {found.group()} in an answer")
    return ConvertedQuestion(question.strip(), answer.strip(), rejected, time)


def with_rejected(questions: tuple[ConvertedQuestion, ...], rejected: Any) -> tuple[ConvertedQuestion, ...]:
    """Set the rejected answer of the last question, for formats that give it outside the conversation."""
    if rejected is None:
        return questions
    last = questions[-1]
    return (*questions[:-1], make_question(last.question, last.answer, rejected, last.time))


def with_chosen(turns: list[Turn], chosen: Any, media: Media) -> list[Turn]:
    """Append the chosen answer (a turn, or its text), for formats that give it outside the conversation."""
    if chosen is None:
        return turns
    return [*turns, replace(answer_turn(chosen, media), role="chosen")]


def answer_turn(value: Any, media: Media) -> Turn:
    """Read an answer given as a turn, as a list that ends with a turn, or as text."""
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, str):
        return Turn("assistant", value)
    turn = read_turn(value, media)
    if turn.role != "assistant":
        raise BadRow(f"an answer must be an assistant turn, got a turn of {turn.role}")
    return turn


def _without_placeholders(text: str) -> str:
    """The text without placeholders and the line breaks around them."""
    return PLACEHOLDERS_AND_SPACE.sub(lambda found: "\n" if "\n" in found.group() else " ", text).strip()

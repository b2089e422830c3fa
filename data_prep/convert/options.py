"""Multiple choice: read options in the ways tables write them, append them to the question, find the answer's letter.

letter, from_zero = answer_letter("a dog", read_options(["A. a cat", "B. a dog"]))  # "B", False
"""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Mapping
from typing import Any

from data_prep.manifest import BadRow, short

INSTRUCTION = "Answer with the letter of the right option."

LETTERED = re.compile(r"\(?([A-Za-z])[.:)]+\s*(.*)", re.DOTALL)

AnswerForm = str  # "auto", "letter", "index", "index1" or "text": how an answer names its option


def read_options(value: Any) -> list[str]:
    """Return the texts of the options without their letters; an empty list for an empty cell.

    `value` is a list, an object by letter, or text: JSON, a printed Python list, or options separated by `|` or line
    breaks.

    Raises
    ------
    BadRow
        Fewer than 2 or more than 26 options, or an empty one.
    """
    if isinstance(value, str):
        value = _parsed(value.strip())
    if isinstance(value, Mapping):
        value = [f"{letter}. {text}" for letter, text in value.items() if text is not None]
    if value is None or value == []:
        return []
    if not isinstance(value, list | tuple):
        raise BadRow(f"options must be a list, or text such as A. yes|B. no; got {short(value)}")
    texts = [str(one).strip() for one in value]
    found = [LETTERED.fullmatch(text) for text in texts]
    letters = "".join(match[1].upper() for match in found if match)
    if letters == string.ascii_uppercase[: len(texts)]:
        texts = [match[2].strip() for match in found if match]
    if not 2 <= len(texts) <= 26 or not all(texts):
        raise BadRow(f"options must be 2 to 26 texts that are not empty, got {short(value)}")
    return texts


def _parsed(text: str) -> Any:
    if text[:1] in ("[", "{", "("):
        for parse in (json.loads, ast.literal_eval):
            try:
                return parse(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    return [part for part in re.split(r"\||\n", text) if part.strip()] if text else None


def with_options(question: str, options: list[str]) -> str:
    """The question followed by its lettered options and the instruction to answer with a letter."""
    lines = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, options, strict=False)]
    return "\n".join([question.strip(), *lines, INSTRUCTION])


def answer_letter(answer: Any, options: list[str], form: AnswerForm = "auto") -> tuple[str, bool]:
    """Return the letter of the right option, and whether "auto" read the answer as a number from 0.

    Parameters
    ----------
    answer : text or int
        A letter (`B`, `(b)`, `B. text`), a number, or the text of an option.
    options : list of str
    form : {"auto", "letter", "index", "index1", "text"}
        What `answer` is; index counts from 0, index1 from 1. "auto" tries letter, text and index, and takes the option
        if all forms that fit name the same one.

    Raises
    ------
    BadRow
        No option fits, or under "auto" two forms name different options.
    """
    text = str(answer).strip()
    readings = {
        "letter": _by_letter(text, options),
        "text": _by_text(text, options),
        "index": _by_number(text, options, 0),
        "index1": _by_number(text, options, 1),
    }
    if form != "auto":
        place = readings[form]
        if place is None:
            raise BadRow(f"answer {short(text)} is not the {form} of one of {len(options)} options")
        return string.ascii_uppercase[place], False
    fits = {name: readings[name] for name in ("letter", "text", "index") if readings[name] is not None}
    places = {place for place in fits.values() if place is not None}
    if len(places) != 1:
        why = "can be read as " + " or ".join(fits) if fits else f"is none of the {len(options)} options"
        raise BadRow(f"answer {short(text)} {why}; choose one with --answers")
    return string.ascii_uppercase[places.pop()], list(fits) == ["index"]


def _by_letter(text: str, options: list[str]) -> int | None:
    match = LETTERED.fullmatch(text)
    letter, rest = (match[1], match[2].strip()) if match else (text, "")
    place = string.ascii_uppercase.find(letter.upper()) if len(letter) == 1 else -1
    if not 0 <= place < len(options) or (rest and rest != options[place]):
        return None
    return place


def _by_text(text: str, options: list[str]) -> int | None:
    same = [place for place, option in enumerate(options) if option.casefold() == text.casefold()]
    return same[0] if len(same) == 1 else None


def _by_number(text: str, options: list[str], first: int) -> int | None:
    if not re.fullmatch(r"\d{1,2}(\.0)?", text):
        return None
    place = int(float(text)) - first
    return place if 0 <= place < len(options) else None

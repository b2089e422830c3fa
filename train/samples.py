"""Rows of the data with their questions tokenized."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from data_prep.manifest import Row
from omnimem.backbones import Backbone


@dataclass(frozen=True)
class TokenizedQuestion:
    """Token ids of a question ``[Q]`` and its answer ``[A]``, and when it is asked (seconds; None: at the end)."""

    question: Tensor
    answer: Tensor
    time: float | None


@dataclass(frozen=True)
class Sample:
    """A row with its questions tokenized, earliest first."""

    row: Row
    questions: tuple[TokenizedQuestion, ...]

    @property
    def answer_tokens(self) -> int:
        """Tokens that the loss is taken over."""
        return sum(len(question.answer) for question in self.questions)


def tokenize_row(row: Row, backbone: Backbone) -> Sample:
    """Tokenize the questions of a row: earliest first, those at the end last."""
    questions = sorted(row.questions, key=lambda q: math.inf if q.time is None else q.time)
    return Sample(
        row,
        tuple(
            TokenizedQuestion(backbone.question_ids(q.question)[0], backbone.answer_ids(q.answer)[0], q.time)
            for q in questions
        ),
    )


class Samples:
    """The rows of a run, each tokenized when it is needed.

    Tokenizing takes tenths of a millisecond per row: 200,000 rows would delay the start of every process by a minute.

    Parameters
    ----------
    rows : list of Row
        All usable rows.
    backbone : Backbone
        Provides the tokenizer.
    """

    def __init__(self, rows: list[Row], backbone: Backbone) -> None:
        self._rows = rows
        # A step reads its rows twice: to count its answer tokens, then to run them.
        self._tokenized = lru_cache(maxsize=4096)(lambda number: tokenize_row(rows[number], backbone))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Sample:
        return self._tokenized(number)

"""When the questions about the streams of a batch are asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from train.batch_encoder import Chunks
from train.parallel import ParallelStrategy
from train.samples import Sample, TokenizedQuestion

DueQuestions = list[TokenizedQuestion | None]
"""One question or None for each stream of a batch."""


class QuestionSchedule:
    """Pending questions of each stream of a batch, in the order of their times.

    Parameters
    ----------
    samples : sequence of Sample
        The batch.
    strategy : ParallelStrategy
        Processes in lockstep: all answer as often as the one with the most questions.
    """

    def __init__(self, samples: Sequence[Sample], strategy: ParallelStrategy) -> None:
        self._pending = [deque(sample.questions) for sample in samples]
        self._strategy = strategy

    def after_chunk(self, chunks: Chunks) -> Iterator[DueQuestions]:
        """Yield the questions whose time lies within the chunks just read or before."""

        def is_due(number: int, question: TokenizedQuestion) -> bool:
            chunk = chunks[number]
            return question.time is not None and chunk is not None and question.time <= chunk.t1

        return self._rounds(is_due)

    def at_end(self) -> Iterator[DueQuestions]:
        """Yield all remaining questions."""
        return self._rounds(lambda number, question: True)

    def cancel(self, number: int) -> None:
        """Drop the remaining questions of a stream."""
        self._pending[number].clear()

    def _rounds(self, is_due: Callable[[int, TokenizedQuestion], bool]) -> Iterator[DueQuestions]:
        """Yield rounds of at most one due question per stream, until no process in lockstep has any."""
        while True:
            due: DueQuestions = [
                pending.popleft() if pending and is_due(number, pending[0]) else None
                for number, pending in enumerate(self._pending)
            ]
            if not self._strategy.any_process(any(due)):
                return
            yield due

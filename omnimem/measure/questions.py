"""Stream clips, ask each question at its time, and score the answers.

    result = answer_questions(session, rows, max_new_tokens=16)
    print(result["accuracy"], result["accuracy_low"], result["accuracy_high"], result["nll"])

An answer is correct if it equals the reference up to case, white space and final punctuation. The mean negative
log-likelihood of the reference also distinguishes methods that never generate it verbatim.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from omnimem.errors import OmniMemError
from omnimem.measure.meter import Meter
from omnimem.media import MediaError
from omnimem.stream import StreamEvent, StreamingSession

log = logging.getLogger("omnimem.measure.questions")


class Question(Protocol):
    """A question with its reference answer."""

    @property
    def question(self) -> str:
        """The question."""
        ...

    @property
    def answer(self) -> str:
        """The reference answer."""
        ...

    @property
    def time(self) -> float | None:
        """Second of the clip at which to ask; None: at the end."""
        ...


class Row(Protocol):
    """A clip and its questions, as `data_prep.manifest` reads them."""

    @property
    def media(self) -> Path:
        """The file."""
        ...

    @property
    def name(self) -> str:
        """Name of the clip in the results."""
        ...

    @property
    def audio(self) -> bool:
        """False ignores the audio track."""
        ...

    @property
    def questions(self) -> Sequence[Question]:
        """At least one."""
        ...


def answer_questions(
    session: StreamingSession, rows: Sequence[Row], max_new_tokens: int, warned: set[str] | None = None
) -> dict[str, Any]:
    """Stream every clip into an empty cache and ask its questions.

    Parameters
    ----------
    session : StreamingSession
        A session that nothing else uses.
    rows : sequence of Row
        Clips; one that cannot be decoded is logged and skipped.
    max_new_tokens : int
        Longest answer in tokens.
    warned : set of str, optional
        Names of skipped clips that have been logged already; new ones are added.

    Returns
    -------
    dict
        ``questions``, ``accuracy``, ``accuracy_low``, ``accuracy_high`` (`cluster_interval`), ``nll`` (nats per
        token, mean over questions); ``retained`` (visual and audio tokens per layer when a question was asked, maximum
        over questions), ``answer_bytes`` (bytes of keys and values then, maximum), ``resident_bytes`` (the same for
        everything stored, `CompressedCache.resident_nbytes`), ``peak_bytes``, ``memory_peak_bytes``,
        ``device_peak_bytes`` (see `Meter`); ``chunk_ms`` (median, without first chunks),
        ``first_token_ms`` (median); ``answers`` (one object per question) and ``skipped_clips`` (one object per clip).

    Raises
    ------
    OmniMemError
        No clip could be read.
    """
    answers: list[dict[str, Any]] = []
    skipped_clips: list[dict[str, str]] = []
    warned = set() if warned is None else warned
    with Meter(session) as meter:
        for row in rows:
            try:
                answers += _ask_about(meter, row, max_new_tokens)
            except MediaError as error:
                skipped_clips.append({"clip": row.name, "reason": str(error)})
                if row.name not in warned:
                    log.warning("clip skipped: %s", error)
                warned.add(row.name)
    if not answers:
        raise OmniMemError(f"no question could be asked: no clip can be read; the first: {skipped_clips[0]['reason']}")
    clips: dict[str, list[bool]] = {}
    for answer in answers:
        clips.setdefault(answer["clip"], []).append(answer["correct"])
    low, high = cluster_interval(list(clips.values()))
    return {
        "questions": len(answers),
        "accuracy": statistics.fmean(answer["correct"] for answer in answers),
        "accuracy_low": low,
        "accuracy_high": high,
        "nll": statistics.fmean(answer["nll"] for answer in answers),
        "retained": max(answer["retained"] for answer in answers),
        "answer_bytes": max(answer["answer_bytes"] for answer in answers),
        "resident_bytes": max(answer["resident_bytes"] for answer in answers),
        "peak_bytes": meter.kv_peak,
        "memory_peak_bytes": meter.memory_peak,
        "device_peak_bytes": meter.device_peak,
        "chunk_ms": 1000 * statistics.median(meter.step_seconds) if meter.step_seconds else None,
        "first_token_ms": statistics.median(answer["first_token_ms"] for answer in answers),
        "answers": answers,
        "skipped_clips": skipped_clips,
    }


def _ask_about(meter: Meter, row: Row, max_new_tokens: int) -> list[dict[str, Any]]:
    """Answers to the questions of one clip: each after the chunk that contains its time, the others at the end."""
    pending = sorted(row.questions, key=lambda question: math.inf if question.time is None else question.time)
    answers = []
    settings = {} if row.audio else {"audio": False}
    for event in meter.watch(row.media, **settings):
        while pending and (event.last or (pending[0].time is not None and pending[0].time <= event.seconds)):
            answers.append({"clip": row.name, **_ask(meter, pending.pop(0), event, max_new_tokens)})
    return answers


def _ask(meter: Meter, question: Question, event: StreamEvent, max_new_tokens: int) -> dict[str, Any]:
    answer, first_token = meter.ask(question.question, max_new_tokens)
    return {
        "seconds": event.seconds,
        "question": question.question,
        "reference": question.answer,
        "answer": answer,
        "correct": normalised(answer) == normalised(question.answer),
        "nll": meter.session.score_answer(question.question, question.answer),
        "retained": event.retained["visual"] + event.retained["audio"],
        "answer_bytes": event.kv_bytes,
        "resident_bytes": event.resident_bytes,
        "first_token_ms": 1000 * first_token,
    }


def normalised(answer: str) -> str:
    """The answer in lower case, without extra white space and final punctuation."""
    return " ".join(answer.casefold().split()).rstrip(" .!?…。")


def cluster_interval(clips: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """95 % confidence interval of the accuracy when the answers about one clip are correlated.

    Wilson's interval with the effective number of questions n_e = p·(1 − p) / v, where v is the cluster-robust variance
    of p (from the squared sums of deviations from p over the questions of a clip), and at most the number of questions.
    If all answers are correct, all are wrong, or there is one clip, v is undefined and n_e is the number of clips.

    Parameters
    ----------
    clips : sequence of sequence of bool
        For each clip, whether each question was answered correctly.

    Returns
    -------
    tuple of float
        Lower and upper end.
    """
    count, number = len(clips), sum(len(clip) for clip in clips)
    p = sum(sum(clip) for clip in clips) / number
    effective: float = count
    if 0 < p < 1 and count > 1:
        v = sum((sum(clip) - p * len(clip)) ** 2 for clip in clips) / number**2 * count / (count - 1)
        effective = min(p * (1 - p) / v, number) if v > 0 else number
    z2 = 1.96**2
    centre = (p + z2 / (2 * effective)) / (1 + z2 / effective)
    half = math.sqrt(z2 * p * (1 - p) / effective + z2**2 / (4 * effective**2)) / (1 + z2 / effective)
    return max(0.0, centre - half), min(1.0, centre + half)

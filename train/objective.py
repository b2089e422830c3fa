"""The loss of a batch of streams, and its way back: chunked, the compressed memory active, questions on the way.

outcome = objective(batch, gradient, budgets)
outcome.backward(1 / targets)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from omnimem.backbones import Backbone
from omnimem.budget import BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.forward import Stream
from omnimem.media import Chunk, MediaError
from omnimem.media.prefetch import prefetch
from omnimem.memory import CompressedCache, SelectionGradient
from omnimem.memory.store import Store
from omnimem.modality import EVICTABLE
from omnimem.recipe import DistillConfig
from omnimem.selection import SelectionMethod
from omnimem.selection.full import Full
from omnimem.stream_settings import StreamSettings
from omnimem.tape import ChunkwiseBPTT, Truncation
from train.data import Sample, TokenizedQuestion, open_row
from train.lesson import BatchEncoder, Rollout, Teacher
from train.processes import ParallelStrategy
from train.teacher import TeacherAnswers

log = logging.getLogger("omnimem.train")


@dataclass(frozen=True)
class Outcome:
    """What a batch of streams gave.

    Attributes
    ----------
    loss : Tensor
        Summed cross-entropy (at least float32, one number), and the teacher's part of it.
    distilled : Tensor
        That part by itself, without its weight.
    targets : int
        Answer tokens.
    positions : int
        Positions streamed.
    retained : dict
        Mean text, visual and audio positions a layer holds at the end.
    retention : dict
        The same as parts of the visual and audio positions streamed.
    gates : dict or None
        See `CompressedCache.gate_statistics`.
    memory_bytes : int
        Bytes of the memory at the end.
    backward : callable
        Adds the gradient of so many times the loss to the parameters.
    """

    loss: Tensor
    distilled: Tensor
    targets: int
    tokens: int
    retained: dict[str, float]
    retention: dict[str, float]
    gates: dict[str, float] | None
    memory_bytes: int
    backward: Callable[[float], None]


class StreamObjective:
    """Cross-entropy of the answers to questions asked while the media stream by.

    Parameters
    ----------
    backbone : Backbone
        The model whose forward is run.
    model : nn.Module
        The same model with its trainable adapter; in training mode there is a way back, and the teacher.
    profile : BudgetProfile
        Budgets of the memory.
    method : SelectionMethod
        Which positions stay.
    settings : StreamSettings
        How media are read.
    distill : DistillConfig, optional
        The same model with everything in view, whose answers the loss also asks for.
    skip_damaged : bool
        Leave a clip that turns out to be damaged half-way out of the loss instead of raising.
    store : Store, optional
        Where records wait for the way back; on the device when left out.
    truncation : Truncation, optional
        Where gradients end.
    processes : Processes, optional
        Those that train together; this one alone when left out.
    encoders_learn : bool
        Whether something before the decoder is trained, so that chunks are encoded again on the way back.
    decode_ahead : int
        Chunks of every clip that are decoded before they are needed.
    answers : TeacherAnswers, optional
        Those of the teacher that are known from before.
    """

    def __init__(
        self,
        backbone: Backbone,
        model: Any,
        profile: BudgetProfile,
        method: SelectionMethod,
        settings: StreamSettings,
        distill: DistillConfig | None = None,
        skip_damaged: bool = False,
        store: Store | None = None,
        truncation: Truncation | None = None,
        processes: ParallelStrategy | None = None,
        encoders_learn: bool = False,
        decode_ahead: int = 0,
        answers: TeacherAnswers | None = None,
    ) -> None:
        self.model = model
        self._backbone, self._profile, self._method, self._settings = backbone, profile, method, settings
        self._skip_damaged, self._store, self._truncation = skip_damaged, store, truncation
        self._decode_ahead, self._answers = decode_ahead, answers
        self._distill = distill if distill is not None and distill.weight > 0 else None
        self._processes, self._encoders_learn = processes or ParallelStrategy(), encoders_learn
        self._loss_dtype = torch.promote_types(backbone.model.dtype, torch.float32)

    @torch.no_grad()
    def __call__(
        self,
        samples: list[Sample],
        gradient: SelectionGradient | None = None,
        profile: BudgetProfile | None = None,
    ) -> Outcome:
        """Run the streams of a batch side by side.

        Parameters
        ----------
        samples : list of Sample
            B rows; shorter streams wait, masked, for the longest.
        gradient : SelectionGradient, optional
            How gradients reach the selection.
        profile : BudgetProfile, optional
            Budgets of this batch; the objective's own when left out.
        """
        training: bool = self.model.training
        cache = CompressedCache(profile or self._profile, self._method, gradient)
        processes = self._processes
        tape = ChunkwiseBPTT(
            Stream(self._backbone, cache),
            self._store,
            self._truncation,
            processes.call,
            processes.backward,
            record=training,
            lockstep=processes.lockstep,
            any_process=processes.any,
        )
        opened = [open_row(sample.row, self._settings, self._backbone) for sample in samples]
        encoders = BatchEncoder([encoder for _, encoder in opened], learn=self._encoders_learn and training)
        waiting = [list(sample.asked) for sample in samples]
        readers = [self._chunks(reader, queue) for (reader, _), queue in zip(opened, waiting, strict=True)]
        # What is measured in evaluation are the answers alone.
        teacher = self._teacher(samples) if training else None
        lesson = Rollout(tape, encoders, teacher, processes, self._loss_dtype)
        for chunks in self._side_by_side(readers):
            lesson.step(chunks)
            for due in self._rounds(waiting, chunks):
                lesson.answer(due)
        for due in self._rounds(waiting, None):
            lesson.answer(due)
        retained = cache.mean_token_counts()
        return Outcome(
            lesson.loss,
            lesson.distilled,
            lesson.targets,
            sum(lesson.streamed.values()),
            retained,
            # As a part of all there was, so that clips of different length can be compared.
            {name: len(samples) * retained[name] / max(1, lesson.streamed[name]) for name in EVICTABLE},
            cache.gate_statistics(),
            cache.kv_nbytes,
            backward=tape.backward,
        )

    def _teacher(self, samples: list[Sample]) -> Teacher | None:
        """The teacher of a batch; of answers that all processes know from before it runs nothing."""
        if self._distill is None:
            return None
        known = None if self._answers is None else self._answers.load(samples)
        if not self._processes.any(known is None):
            return Teacher(self._distill, self._processes, samples, known=known)
        return Teacher(
            self._distill,
            self._processes,
            samples,
            Stream(self._backbone, CompressedCache(self._profile, Full())),
            nullcontext if self._distill.teacher_adapter else self.model.disable_adapter,
            self._answers,
        )

    def _side_by_side(self, readers: Sequence[Iterator[Chunk]]) -> Iterator[tuple[Chunk | None, ...]]:
        """The next chunk of every clip until all have ended, here and in all processes in lockstep."""
        together = zip_longest(*readers)
        while True:
            chunks = next(together, None)
            if not self._processes.any(chunks is not None):
                return
            yield (None,) * len(readers) if chunks is None else chunks

    def _chunks(self, reader: Iterable[Chunk], queue: list[TokenizedQuestion]) -> Iterator[Chunk]:
        """Chunks of a clip; if it breaks off and may be skipped, nothing more is asked about it."""
        try:
            yield from prefetch(reader, self._decode_ahead)
        except MediaError as error:
            if not self._skip_damaged:
                raise OmniMemError(f"{error}; data.on_bad_row=skip leaves it out of the training") from error
            log.warning("left out of this step: %s", error)
            queue.clear()

    def _rounds(
        self, waiting: list[list[TokenizedQuestion]], chunks: tuple[Chunk | None, ...] | None
    ) -> Iterator[list[TokenizedQuestion | None]]:
        """Take due questions off `waiting`, one a sample at a time, until no process in lockstep has any.

        With the chunks just read, those whose time has come are due; without (the end of the stream), all are.
        """
        while True:
            due: list[TokenizedQuestion | None] = []
            for i, queue in enumerate(waiting):
                chunk = None if chunks is None else chunks[i]
                ready = bool(queue) and (
                    chunks is None or (queue[0].time is not None and chunk is not None and queue[0].time <= chunk.t1)
                )
                due.append(queue.pop(0) if ready else None)
            if not self._processes.any(any(due)):
                return
            yield due

"""The loss of a batch of streams, and its way back: chunked, the compressed memory active, questions on the way.

outcome = objective(batch, gradient, budgets)
outcome.backward(1 / targets)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimem.backbones import Backbone, ChunkInputs, StreamEncoder
from omnimem.budget import BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.forward import Stream
from omnimem.media import Chunk, MediaError
from omnimem.memory import CompressedCache, SelectionGradient
from omnimem.memory.store import Store
from omnimem.memory.table import count
from omnimem.modality import EVICTABLE
from omnimem.selection import SelectionMethod
from omnimem.selection.full import Full
from omnimem.stream import StreamSettings
from omnimem.tape import Tape, Truncation
from train.config import DistillConfig
from train.data import Asked, Sample, open_row
from train.feed import ahead
from train.processes import Processes
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
    positions: int
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
        processes: Processes | None = None,
        encoders_learn: bool = False,
        decode_ahead: int = 0,
        answers: TeacherAnswers | None = None,
    ) -> None:
        self.model = model
        self._backbone, self._profile, self._method, self._settings = backbone, profile, method, settings
        self._skip_damaged, self._store, self._truncation = skip_damaged, store, truncation
        self._ahead, self._answers = decode_ahead, answers
        self._distill = distill if distill is not None and distill.weight > 0 else None
        self._processes, self._encoders_learn = processes or Processes(), encoders_learn
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
        stream = Stream(self._backbone, cache)
        processes = self._processes
        tape = Tape(
            stream,
            self._store,
            self._truncation,
            processes.call,
            processes.backward,
            record=training,
            lockstep=processes.lockstep,
        )
        # What is measured in evaluation are the answers alone.
        teacher, known = None, None
        if self._distill is not None and training:
            known = None if self._answers is None else self._answers.load(samples)
            if processes.any(known is None):
                teacher, known = Stream(self._backbone, CompressedCache(self._profile, Full())), None
        opened = [open_row(sample.row, self._settings, self._backbone) for sample in samples]
        encoders = [encoder for _, encoder in opened]
        waiting = [list(sample.asked) for sample in samples]
        readers = [self._chunks(reader, queue) for (reader, _), queue in zip(opened, waiting, strict=True)]
        loss = torch.zeros((), dtype=self._loss_dtype, device=self._backbone.device)
        distilled = torch.zeros_like(loss)
        targets = positions = 0
        streamed = dict.fromkeys(EVICTABLE, 0)

        def teach(step: Callable[[Stream], Any]) -> Any:
            """Let the teacher see what the student sees."""
            if (present := teacher) is not None:
                with self._teaching():
                    return processes.call(lambda: step(present))

        def ask(due: list[Asked | None]) -> None:
            nonlocal loss, distilled, targets
            if not any(due):
                teach(lambda one: _forgotten(one, prefix))
                tape.idle(prefix, probes=False)
                return
            closing = ChunkInputs.batch([encoder.closing() for encoder in encoders])
            nothing = torch.zeros(0, dtype=torch.int64)
            question = [nothing if asked is None else asked.question for asked in due]
            answer = [nothing if asked is None else asked.answer for asked in due]
            if known is None:
                wanted = teach(lambda one: one.answer_logits(closing, question, answer)[0].cpu())
            else:
                wanted = torch.cat([known[asked] for asked in due if asked is not None])
            if teacher is not None and self._answers is not None:
                self._answers.save(samples, due, wanted)
            ends = partial(_closed, forks, since) if learn and any(e.carries for e in encoders) else None

            def answered() -> tuple[Tensor, ...]:
                end = ends() if ends is not None and torch.is_grad_enabled() else closing
                return self._answered(stream, end, question, answer, wanted)

            _, entropy, divergence = tape.ask(answered)
            loss, distilled, targets = loss + entropy, distilled + divergence, targets + sum(map(len, answer))

        prefix = ChunkInputs.batch([encoder.prefix() for encoder in encoders])
        # Where encoders learn: the last place where none of them carried anything on, and the chunks since.
        learn = self._encoders_learn and training
        forks: list[StreamEncoder] = []
        since: tuple[tuple[Chunk | None, ...], ...] = ()
        tape.forward(prefix)
        teach(lambda one: one.forward(prefix, text=True))
        for chunks in self._side_by_side(readers):
            again = None
            if learn:
                if not any(encoder.carries for encoder in encoders):
                    forks, since = [encoder.fork() for encoder in encoders], ()
                since = (*since, chunks)
                again = partial(_encoded_again, forks, since)
            chunk = _encoded(encoders, chunks)
            real = torch.ones_like(chunk.modality, dtype=torch.bool) if chunk.valid is None else chunk.valid
            for sample in count(chunk.modality, real):
                positions += sum(sample.values())
                streamed = {name: streamed[name] + sample[name] for name in EVICTABLE}
            if len(chunk) > 0:
                tape.step(chunk, again)
                teach(lambda one, chunk=chunk: one.step(chunk))
            elif processes.lockstep:
                tape.idle(prefix, probes=True)
                teach(lambda one: _forgotten(one, prefix))
            for due in self._rounds(waiting, chunks):
                ask(due)
        for due in self._rounds(waiting, None):
            ask(due)
        if self._distill is not None and training:
            loss = loss + self._distill.weight * distilled
        retained = cache.mean_counts()
        return Outcome(
            loss,
            distilled,
            targets,
            positions,
            retained,
            # As a part of all there was, so that clips of different length can be compared.
            {name: len(samples) * retained[name] / max(1, streamed[name]) for name in EVICTABLE},
            cache.gate_statistics(),
            cache.state_nbytes,
            backward=tape.backward,
        )

    def _side_by_side(self, readers: Sequence[Iterator[Chunk]]) -> Iterator[tuple[Chunk | None, ...]]:
        """The next chunk of every clip until all have ended, here and in all processes in lockstep."""
        together = zip_longest(*readers)
        while True:
            chunks = next(together, None)
            if not self._processes.any(chunks is not None):
                return
            yield (None,) * len(readers) if chunks is None else chunks

    def _chunks(self, reader: Iterable[Chunk], queue: list[Asked]) -> Iterator[Chunk]:
        """Chunks of a clip; if it breaks off and may be skipped, nothing more is asked about it."""
        try:
            yield from ahead(reader, self._ahead)
        except MediaError as error:
            if not self._skip_damaged:
                raise OmniMemError(f"{error}; data.on_bad_row=skip leaves it out of the training") from error
            log.warning("left out of this step: %s", error)
            queue.clear()

    @contextmanager
    def _teaching(self) -> Iterator[None]:
        """The teacher's model: the base model's weights unless it has the adapter too."""
        assert self._distill is not None
        with nullcontext() if self._distill.adapter else self.model.disable_adapter():
            yield

    def _answered(
        self, stream: Stream, closing: ChunkInputs, question: list[Tensor], answer: list[Tensor], wanted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of answers given now: the whole of it, its cross-entropy and its divergence from the teacher's logits.

        The divergence is KL(teacher ‖ student) of the answer tokens at temperature T, times T² (Hinton et al., 2015).
        """
        logits, targets = stream.answer_logits(closing, question, answer)
        logits = logits.to(self._loss_dtype)
        entropy = F.cross_entropy(logits, targets, reduction="sum")
        if wanted is None or self._distill is None:
            return entropy, entropy, torch.zeros_like(entropy)
        t = self._distill.temperature
        wanted = (wanted.to(logits.device, self._loss_dtype) / t).log_softmax(-1)
        divergence = F.kl_div((logits / t).log_softmax(-1), wanted, reduction="sum", log_target=True) * t**2
        return entropy + self._distill.weight * divergence, entropy, divergence

    def _rounds(
        self, waiting: list[list[Asked]], chunks: tuple[Chunk | None, ...] | None
    ) -> Iterator[list[Asked | None]]:
        """Take due questions off `waiting`, one a sample at a time, until no process in lockstep has any.

        With the chunks just read, those whose time has come are due; without (the end of the stream), all are.
        """
        while True:
            due: list[Asked | None] = []
            for i, queue in enumerate(waiting):
                chunk = None if chunks is None else chunks[i]
                ready = bool(queue) and (
                    chunks is None or (queue[0].time is not None and chunk is not None and queue[0].time <= chunk.t1)
                )
                due.append(queue.pop(0) if ready else None)
            if not self._processes.any(any(due)):
                return
            yield due


def _encoded(encoders: Sequence[StreamEncoder], chunks: Sequence[Chunk | None]) -> ChunkInputs:
    """The next chunk of every stream."""
    return ChunkInputs.batch(
        [e.idle() if chunk is None else e.encode(chunk) for e, chunk in zip(encoders, chunks, strict=True)]
    )


def _encoded_again(forks: Sequence[StreamEncoder], since: Sequence[Sequence[Chunk | None]]) -> ChunkInputs:
    """The last of these chunks, after the others."""
    encoders = [fork.fork() for fork in forks]
    for chunks in since[:-1]:
        _encoded(encoders, chunks)
    return _encoded(encoders, since[-1])


def _closed(forks: Sequence[StreamEncoder], since: Sequence[Sequence[Chunk | None]]) -> ChunkInputs:
    """What ends the media behind these chunks."""
    encoders = [fork.fork() for fork in forks]
    for chunks in since:
        _encoded(encoders, chunks)
    return ChunkInputs.batch([encoder.closing() for encoder in encoders])


def _forgotten(stream: Stream, text: ChunkInputs) -> None:
    """A forward pass that leaves no trace."""
    with stream.cache.scratch():
        stream.forward(text, text=True)

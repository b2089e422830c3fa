"""One batch of streams: encoders side by side, the tape that is learnt from, the teacher beside it.

lesson = Lesson(tape, encoders, teacher, processes, torch.float32)
lesson.take(chunks)  # the next chunk of every stream
lesson.ask(due)  # a question to some of them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimem.backbones import ChunkInputs, StreamEncoder
from omnimem.forward import Stream
from omnimem.media import Chunk
from omnimem.memory.table import count
from omnimem.modality import KINDS
from omnimem.recipe import DistillConfig
from omnimem.tape import ChunkwiseBPTT
from train.data import Sample, TokenizedQuestion
from train.processes import ParallelStrategy
from train.teacher import TeacherAnswers

Chunks = Sequence[Chunk | None]
"""The next chunk of every stream of a batch; None for one that has ended."""

Again = Callable[[], ChunkInputs]
"""Makes the same inputs once more, with a graph."""


class BatchEncoder:
    """The encoders of a batch side by side; where they learn, what they made can be made again.

    Parameters
    ----------
    encoders : sequence of StreamEncoder
        One a sample, at its beginning.
    learn : bool
        Whether something in them is trained.
    """

    def __init__(self, encoders: Sequence[StreamEncoder], learn: bool) -> None:
        self._encoders, self._learn = encoders, learn
        # The last place where none of them carried anything on, and the chunks since.
        self._forks: Sequence[StreamEncoder] = ()
        self._since: tuple[Chunks, ...] = ()

    def prefix(self) -> ChunkInputs:
        """What stands before the media."""
        return ChunkInputs.batch([encoder.prefix() for encoder in self._encoders])

    def encode(self, chunks: Chunks) -> tuple[ChunkInputs, Again | None]:
        """The next chunks, and how to make them again."""
        if self._learn:
            if not self._carries:
                self._forks, self._since = [encoder.fork() for encoder in self._encoders], ()
            self._since = (*self._since, chunks)
        inputs = _encoded(self._encoders, chunks)
        return inputs, partial(_encoded_again, self._forks, self._since) if self._learn else None

    def closing(self) -> tuple[ChunkInputs, Again | None]:
        """What ends the media here, and how to make it again if there is anything in it that learns."""
        again = partial(_closed_again, self._forks, self._since) if self._learn and self._carries else None
        return _closed(self._encoders), again

    @property
    def _carries(self) -> bool:
        return any(encoder.has_pending_input for encoder in self._encoders)


class Teacher:
    """The same model with everything in view, whose answers the loss also asks for.

    Parameters
    ----------
    distill : DistillConfig
        Weight and temperature.
    processes : Processes
        Those that train together.
    samples : list of Sample
        The batch.
    stream : Stream, optional
        With a memory that keeps everything; none where all answers are known.
    teaching : callable
        Context in which the model is the teacher's.
    answers : TeacherAnswers, optional
        Where its answers are kept.
    known : dict, optional
        Its answers, from before.
    """

    def __init__(
        self,
        distill: DistillConfig,
        processes: ParallelStrategy,
        samples: list[Sample],
        stream: Stream | None = None,
        teaching: Callable[[], AbstractContextManager[Any]] = nullcontext,
        answers: TeacherAnswers | None = None,
        known: dict[TokenizedQuestion, Tensor] | None = None,
    ) -> None:
        self.weight, self._temperature = distill.weight, distill.temperature
        self._processes, self._samples, self._stream = processes, samples, stream
        self._teaching, self._answers, self._known = teaching, answers, known

    def see(self, step: Callable[[Stream], Any]) -> Any:
        """Let the teacher see what the student sees."""
        if (stream := self._stream) is not None:
            with self._teaching():
                return self._processes.call(lambda: step(stream))

    def answer(
        self, due: list[TokenizedQuestion | None], closing: ChunkInputs, question: list[Tensor], answer: list[Tensor]
    ) -> Tensor:
        """Logits ``[M, vocabulary]`` of the answers to the questions that are due, one after the other."""
        if self._known is not None:
            return torch.cat([self._known[asked] for asked in due if asked is not None])
        logits = self.see(lambda stream: stream.answer_logits(closing, question, answer)[0].cpu())
        if self._answers is not None:
            self._answers.save(self._samples, due, logits)
        return logits

    def divergence(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """KL(teacher ‖ student) of the answer tokens at temperature T, times T² (Hinton et al., 2015)."""
        t = self._temperature
        wanted = (wanted.to(logits.device, logits.dtype) / t).log_softmax(-1)
        return F.kl_div((logits / t).log_softmax(-1), wanted, reduction="sum", log_target=True) * t**2


class Rollout:
    """Streams of a batch, questions on the way, and what the answers cost.

    Parameters
    ----------
    tape : Tape
        With an empty memory.
    encoders : BatchEncoder
        At the beginning of the streams, whose prefix is taken in here.
    teacher : Teacher, optional
        Beside it.
    processes : Processes
        Those that train together.
    dtype : torch.dtype
        Of the loss.

    Attributes
    ----------
    distilled : Tensor
        The teacher's part of the loss, without its weight.
    targets : int
        Answer tokens.
    streamed : dict
        Positions taken in by modality.
    """

    def __init__(
        self,
        tape: ChunkwiseBPTT,
        encoders: BatchEncoder,
        teacher: Teacher | None,
        processes: ParallelStrategy,
        dtype: torch.dtype,
    ) -> None:
        self._tape, self._encoders, self._teacher, self._processes = tape, encoders, teacher, processes
        self._entropy = torch.zeros((), dtype=dtype, device=tape.stream.backbone.device)
        self.distilled = torch.zeros_like(self._entropy)
        self.targets = 0
        self.streamed = dict.fromkeys(KINDS, 0)
        self._prefix = encoders.prefix()
        tape.forward(self._prefix)
        self._show(lambda stream: stream.forward(self._prefix, text=True))

    def step(self, chunks: Chunks) -> None:
        """Take in the next chunk of every stream."""
        inputs, again = self._encoders.encode(chunks)
        real = torch.ones_like(inputs.modality, dtype=torch.bool) if inputs.valid is None else inputs.valid
        for sample in count(inputs.modality, real):
            self.streamed = {name: self.streamed[name] + sample[name] for name in KINDS}
        if len(inputs) > 0:
            self._tape.step(inputs, again)
            self._show(lambda stream: stream.step(inputs))
        elif self._processes.lockstep:
            # In the order of those that take something in, as below in that of those that are asked.
            self._tape.empty_pass(self._prefix, probes=True)
            self._show(lambda stream: _forgotten(stream, self._prefix))

    def answer(self, due: list[TokenizedQuestion | None]) -> None:
        """Ask some of the streams something; None, where nothing is due."""
        if not any(due):
            self._show(lambda stream: _forgotten(stream, self._prefix))
            self._tape.empty_pass(self._prefix, probes=False)
            return
        closing, again = self._encoders.closing()
        nothing = torch.zeros(0, dtype=torch.int64)
        question = [nothing if asked is None else asked.question for asked in due]
        answer = [nothing if asked is None else asked.answer for asked in due]
        wanted = None if self._teacher is None else self._teacher.answer(due, closing, question, answer)

        def answered() -> tuple[Tensor, Tensor, Tensor]:
            """The whole of the loss, its cross-entropy and its divergence from the teacher's logits."""
            end = closing if again is None or not torch.is_grad_enabled() else again()
            logits, targets = self._tape.stream.answer_logits(end, question, answer)
            logits = logits.to(self._entropy.dtype)
            entropy = F.cross_entropy(logits, targets, reduction="sum")
            if wanted is None or self._teacher is None:
                return entropy, entropy, torch.zeros_like(entropy)
            divergence = self._teacher.divergence(logits, wanted)
            return entropy + self._teacher.weight * divergence, entropy, divergence

        _, entropy, divergence = self._tape.ask(answered)
        self._entropy, self.distilled = self._entropy + entropy, self.distilled + divergence
        self.targets += sum(map(len, answer))

    @property
    def loss(self) -> Tensor:
        """Summed cross-entropy, and the teacher's part of it with its weight."""
        return self._entropy if self._teacher is None else self._entropy + self._teacher.weight * self.distilled

    def _show(self, step: Callable[[Stream], Any]) -> None:
        if self._teacher is not None:
            self._teacher.see(step)


def _encoded(encoders: Sequence[StreamEncoder], chunks: Chunks) -> ChunkInputs:
    """The next chunk of every stream."""
    return ChunkInputs.batch(
        [e.empty_step() if chunk is None else e.encode(chunk) for e, chunk in zip(encoders, chunks, strict=True)]
    )


def _closed(encoders: Sequence[StreamEncoder]) -> ChunkInputs:
    return ChunkInputs.batch([encoder.closing() for encoder in encoders])


def _encoded_again(forks: Sequence[StreamEncoder], since: Sequence[Chunks]) -> ChunkInputs:
    """The last of these chunks, after the others."""
    encoders = [fork.fork() for fork in forks]
    for chunks in since[:-1]:
        _encoded(encoders, chunks)
    return _encoded(encoders, since[-1])


def _closed_again(forks: Sequence[StreamEncoder], since: Sequence[Chunks]) -> ChunkInputs:
    """What ends the media behind these chunks."""
    encoders = [fork.fork() for fork in forks]
    for chunks in since:
        _encoded(encoders, chunks)
    return _closed(encoders)


def _forgotten(stream: Stream, text: ChunkInputs) -> None:
    """A forward pass that leaves no trace."""
    with stream.cache.scratch():
        stream.forward(text, text=True)

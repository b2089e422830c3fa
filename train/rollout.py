"""Rollout of a batch: stream the chunks, answer the questions on the way, sum the loss of the answers.

rollout = Rollout(bptt, encoders, teacher, strategy, torch.float32)
rollout.step(chunks)  # the next chunk of every stream
rollout.answer(due)  # a question about some of the streams
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimem.backbones import ChunkInputs
from omnimem.bptt import ChunkwiseBPTT
from omnimem.forward import Stream
from omnimem.modality import KINDS
from omnimem.token_metadata import count_tokens
from train.batch_encoder import BatchEncoder, Chunks, Recompute
from train.parallel import ParallelStrategy
from train.question_schedule import DueQuestions
from train.teacher import Teacher


@dataclass(frozen=True)
class AnswerLoss:
    """Loss of the answers to one round of questions; `ChunkwiseBPTT` calls it in the forward and the backward pass.

    Attributes
    ----------
    stream : Stream
        The student.
    closing : ChunkInputs
        End-of-media tokens (they close the media block before a question).
    recompute_closing : callable, optional
        Recomputes `closing` in the backward pass, if trained encoders produced it.
    question, answer : list of Tensor
        Token ids ``[Q]`` and ``[A]`` of each stream; empty where no question is due.
    dtype : torch.dtype
        Of the loss.
    teacher : Teacher, optional
        For distillation.
    teacher_logits : Tensor, optional
        ``[M, V]``, with a teacher.
    """

    stream: Stream
    closing: ChunkInputs
    recompute_closing: Recompute | None
    question: list[Tensor]
    answer: list[Tensor]
    dtype: torch.dtype
    teacher: Teacher | None
    teacher_logits: Tensor | None

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, its cross-entropy and its divergence from the teacher, summed over tokens."""
        recompute = self.recompute_closing if torch.is_grad_enabled() else None
        closing = self.closing if recompute is None else recompute()
        logits, targets = self.stream.answer_logits(closing, self.question, self.answer)
        logits = logits.to(self.dtype)
        cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
        if self.teacher is None or self.teacher_logits is None:
            return cross_entropy, cross_entropy, torch.zeros_like(cross_entropy)
        divergence = self.teacher.divergence(logits, self.teacher_logits)
        return cross_entropy + self.teacher.weight * divergence, cross_entropy, divergence


class Rollout:
    """Streams of a batch, from the prefix to the last answer.

    Parameters
    ----------
    bptt : ChunkwiseBPTT
        With an empty cache.
    encoders : BatchEncoder
        At the start of the streams; their prefix is streamed here.
    teacher : Teacher, optional
        Runs every step of the student on its own full cache.
    strategy : ParallelStrategy
        Processes that train together.
    dtype : torch.dtype
        Of the loss.

    Attributes
    ----------
    distillation_loss : Tensor
        Divergence from the teacher, without its weight.
    answer_tokens : int
        Tokens that the loss is summed over.
    streamed : dict
        Number of tokens streamed so far by modality.
    """

    def __init__(
        self,
        bptt: ChunkwiseBPTT,
        encoders: BatchEncoder,
        teacher: Teacher | None,
        strategy: ParallelStrategy,
        dtype: torch.dtype,
    ) -> None:
        self._bptt, self._encoders, self._teacher, self._strategy = bptt, encoders, teacher, strategy
        self._cross_entropy = torch.zeros((), dtype=dtype, device=bptt.stream.backbone.device)
        self.distillation_loss = torch.zeros_like(self._cross_entropy)
        self.answer_tokens = 0
        self.streamed = dict.fromkeys(KINDS, 0)
        self._prefix = encoders.prefix()
        bptt.forward(self._prefix)
        self._run_teacher(lambda stream: stream.forward(self._prefix, text=True))

    def step(self, chunks: Chunks) -> None:
        """Stream the next chunk of every stream and compress the cache."""
        inputs, recompute = self._encoders.encode(chunks)
        valid = torch.ones_like(inputs.modality, dtype=torch.bool) if inputs.valid is None else inputs.valid
        for sample in count_tokens(inputs.modality, valid):
            self.streamed = {name: self.streamed[name] + sample[name] for name in KINDS}
        if len(inputs) > 0:
            self._bptt.step(inputs, recompute)
            self._run_teacher(lambda stream: stream.step(inputs))
        elif self._strategy.lockstep:
            # Student before teacher, as in the processes that stream a chunk.
            self._bptt.empty_pass(self._prefix, matches_step=True)
            self._run_teacher(self._empty_pass)

    def answer(self, due: DueQuestions) -> None:
        """Add the loss of the answers to the due questions; without any, make the passes that lockstep needs."""
        if not any(due):
            # Teacher before student, as in the processes that answer.
            self._run_teacher(self._empty_pass)
            self._bptt.empty_pass(self._prefix, matches_step=False)
            return
        closing, recompute = self._encoders.closing()
        nothing = torch.zeros(0, dtype=torch.int64)
        question = [nothing if one is None else one.question for one in due]
        answer = [nothing if one is None else one.answer for one in due]
        teacher = self._teacher
        teacher_logits = None if teacher is None else teacher.logits(due, closing, question, answer)
        dtype = self._cross_entropy.dtype
        loss = AnswerLoss(self._bptt.stream, closing, recompute, question, answer, dtype, teacher, teacher_logits)
        _, cross_entropy, divergence = self._bptt.add_loss(loss)
        self._cross_entropy = self._cross_entropy + cross_entropy
        self.distillation_loss = self.distillation_loss + divergence
        self.answer_tokens += sum(map(len, answer))

    @property
    def loss(self) -> Tensor:
        """Summed cross-entropy plus the weighted divergence from the teacher."""
        if self._teacher is None:
            return self._cross_entropy
        return self._cross_entropy + self._teacher.weight * self.distillation_loss

    def _run_teacher(self, step: Callable[[Stream], Any]) -> None:
        if self._teacher is not None:
            self._teacher.run(step)

    def _empty_pass(self, stream: Stream) -> None:
        """A forward pass of the teacher that leaves its cache unchanged."""
        with stream.cache.scratch():
            stream.forward(self._prefix, text=True)

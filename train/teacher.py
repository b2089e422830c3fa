"""The teacher of distillation reads the student's streams with a full cache.

It is the base model or, with `distill.teacher_adapter=true`, the model with its adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimem.backbones import ChunkInputs
from omnimem.forward import Stream
from omnimem.recipe import DistillConfig
from train.parallel import ParallelStrategy
from train.question_schedule import DueQuestions
from train.samples import Sample, TokenizedQuestion
from train.teacher_cache import TeacherCache


class Teacher:
    """Logits of the teacher for a batch, and the divergence of the student from them.

    Parameters
    ----------
    distill : DistillConfig
        Weight and temperature.
    strategy : ParallelStrategy
        Processes that train together.
    samples : list of Sample
        The batch.
    stream : Stream, optional
        The teacher's stream; none if all its logits are known.
    weights : callable
        Context in which the model has the teacher's weights.
    cache : TeacherCache, optional
        Stores new logits.
    known : dict, optional
        Logits from the cache.
    """

    def __init__(
        self,
        distill: DistillConfig,
        strategy: ParallelStrategy,
        samples: list[Sample],
        stream: Stream | None = None,
        weights_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        cache: TeacherCache | None = None,
        cached_logits: dict[TokenizedQuestion, Tensor] | None = None,
    ) -> None:
        self.weight, self._temperature = distill.weight, distill.temperature
        self._strategy, self._samples, self._stream = strategy, samples, stream
        self._weights, self._cache, self._known = weights_context, cache, cached_logits

    def run(self, step: Callable[[Stream], Any]) -> Any:
        """Run a step of the student on the teacher's stream, if it has one."""
        if (stream := self._stream) is not None:
            with self._weights():
                return self._strategy.call(lambda: step(stream))

    def logits(self, due: DueQuestions, closing: ChunkInputs, question: list[Tensor], answer: list[Tensor]) -> Tensor:
        """Logits ``[M, V]`` of the answers to the due questions, concatenated over the batch."""
        if self._known is not None:
            return torch.cat([self._known[one] for one in due if one is not None])
        logits = self.run(lambda stream: stream.answer_logits(closing, question, answer)[0].cpu())
        if self._cache is not None:
            self._cache.save(self._samples, due, logits)
        return logits

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(teacher ‖ student) at temperature T, times T², summed over tokens (arXiv 1503.02531, section 2).

        Parameters
        ----------
        student, teacher : Tensor
            Logits ``[M, V]``.
        """
        t = self._temperature
        target = (teacher.to(student.device, student.dtype) / t).log_softmax(-1)
        return F.kl_div((student / t).log_softmax(-1), target, reduction="sum", log_target=True) * t**2

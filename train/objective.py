"""The training objective: cross-entropy of the answers, plus distillation, over streams with a compressed cache.

result = objective(batch, gradient, budgets)
result.backward(1 / answer_tokens)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnimem.backbones import Backbone
from omnimem.bptt import ChunkwiseBPTT, Truncation
from omnimem.budget import BudgetProfile
from omnimem.forward import Stream
from omnimem.memory import CompressedCache, SelectionGradient
from omnimem.memory.codec import KvDtype
from omnimem.memory.offload_store import Store
from omnimem.modality import EVICTABLE
from omnimem.recipe import DistillConfig
from omnimem.selection import SelectionMethod
from omnimem.selection.full import Full
from omnimem.stream_settings import StreamSettings
from train.batch_encoder import BatchEncoder
from train.batch_reader import BatchReader
from train.data import open_row
from train.parallel import ParallelStrategy
from train.question_schedule import QuestionSchedule
from train.rollout import Rollout
from train.samples import Sample
from train.teacher import Teacher
from train.teacher_cache import TeacherCache


@dataclass(frozen=True)
class BatchResult:
    """Result of the forward pass over a batch of streams.

    Attributes
    ----------
    loss : Tensor
        Cross-entropy plus weighted divergence, summed over answer tokens (scalar, at least float32).
    distillation_loss : Tensor
        The divergence without its weight.
    answer_tokens : int
        Tokens that the loss is summed over.
    tokens : int
        Tokens streamed.
    retained : dict
        Text, visual and audio tokens in the cache at the end, mean over layers and samples.
    retention : dict
        Retained visual and audio tokens as a share of those streamed.
    gates : dict or None
        See `CompressedCache.gate_statistics`.
    kv_bytes : int
        Bytes of the keys and values in the cache at the end.
    memory_bytes : int
        Bytes of everything stored then: keys, values, features, metadata, attention scores.
    backward : callable
        ``backward(weight)`` adds the gradient of ``weight * loss`` to the parameters.
    """

    loss: Tensor
    distillation_loss: Tensor
    answer_tokens: int
    tokens: int
    retained: dict[str, float]
    retention: dict[str, float]
    gates: dict[str, float] | None
    kv_bytes: int
    memory_bytes: int
    backward: Callable[[float], None]


class StreamObjective:
    """Loss of the answers to questions asked while the media stream by.

    Parameters
    ----------
    backbone : Backbone
        The model whose forward is run.
    model : nn.Module
        The same model with its trainable adapter. In training mode the forward pass is recorded for the backward pass,
        and the teacher runs on the same inputs.
    profile : BudgetProfile
        Budgets of the cache.
    method : SelectionMethod
        Which tokens are retained.
    settings : StreamSettings
        How media are read.
    distill : DistillConfig, optional
        Distillation; off if omitted.
    skip_damaged : bool
        Skip the rest of a clip that turns out to be damaged instead of raising.
    store : Store, optional
        Where evicted tokens are kept for the backward pass; on the device if omitted.
    truncation : Truncation, optional
        Truncated backpropagation through time.
    strategy : ParallelStrategy, optional
        Processes that train together; this one alone if omitted.
    train_encoders : bool
        Whether modules before the decoder are trained, so that the backward pass recomputes their outputs.
    prefetch_chunks : int
        Chunks of each clip that a thread decodes in advance.
    teacher_cache : TeacherCache, optional
        Logits of the teacher on disk.
    kv_dtype : {"auto", "fp8", "int8", "int4"}
        How the student's cache stores keys and values; the teacher's cache is never quantised.
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
        strategy: ParallelStrategy | None = None,
        train_encoders: bool = False,
        prefetch_chunks: int = 0,
        teacher_cache: TeacherCache | None = None,
        kv_dtype: KvDtype = "auto",
    ) -> None:
        self.model = model
        self._backbone, self._profile, self._method, self._settings = backbone, profile, method, settings
        self._skip_damaged, self._store, self._truncation = skip_damaged, store, truncation
        self._prefetch_chunks, self._teacher_cache = prefetch_chunks, teacher_cache
        self._kv_dtype: KvDtype = kv_dtype
        self._distill = distill if distill is not None and distill.weight > 0 else None
        self._strategy, self._train_encoders = strategy or ParallelStrategy(), train_encoders
        self._loss_dtype = torch.promote_types(backbone.model.dtype, torch.float32)

    @torch.no_grad()
    def __call__(
        self,
        samples: list[Sample],
        gradient: SelectionGradient | None = None,
        profile: BudgetProfile | None = None,
    ) -> BatchResult:
        """Run the streams of a batch side by side.

        Parameters
        ----------
        samples : list of Sample
            B rows; streams that have ended are masked until the longest ends.
        gradient : SelectionGradient, optional
            Gradient into the selection scores.
        profile : BudgetProfile, optional
            Budgets of this batch; the objective's own if omitted.
        """
        training: bool = self.model.training
        strategy = self._strategy
        cache = CompressedCache(profile or self._profile, self._method, gradient, self._kv_dtype)
        bptt = ChunkwiseBPTT(
            Stream(self._backbone, cache),
            self._store,
            self._truncation,
            strategy.call,
            strategy.backward,
            record=training,
            lockstep=strategy.lockstep,
            any_process=strategy.any_process,
        )
        clips = [open_row(sample.row, self._settings, self._backbone) for sample in samples]
        encoders = BatchEncoder([encoder for _, encoder in clips], train=self._train_encoders and training)
        questions = QuestionSchedule(samples, strategy)
        reader = BatchReader(
            [chunks for chunks, _ in clips],
            self._prefetch_chunks,
            strategy,
            on_damaged=questions.cancel if self._skip_damaged else None,
        )
        teacher = self._new_teacher(samples) if training else None  # evaluation measures the cross-entropy alone
        rollout = Rollout(bptt, encoders, teacher, strategy, self._loss_dtype)
        for chunks in reader:
            rollout.step(chunks)
            for due in questions.after_chunk(chunks):
                rollout.answer(due)
        for due in questions.at_end():
            rollout.answer(due)
        retained = cache.mean_token_counts()
        return BatchResult(
            rollout.loss,
            rollout.distillation_loss,
            rollout.answer_tokens,
            sum(rollout.streamed.values()),
            retained,
            {name: len(samples) * retained[name] / max(1, rollout.streamed[name]) for name in EVICTABLE},
            cache.gate_statistics(),
            cache.kv_nbytes,
            cache.resident_nbytes,
            backward=bptt.backward,
        )

    def _new_teacher(self, samples: list[Sample]) -> Teacher | None:
        """The teacher of a batch.

        It runs the model only if this process or, in lockstep, any process lacks cached logits.
        """
        if self._distill is None:
            return None
        known = None if self._teacher_cache is None else self._teacher_cache.load(samples)
        if not self._strategy.any_process(known is None):
            return Teacher(self._distill, self._strategy, samples, cached_logits=known)
        return Teacher(
            self._distill,
            self._strategy,
            samples,
            Stream(self._backbone, CompressedCache(self._profile, Full())),
            nullcontext if self._distill.teacher_adapter else getattr(self.model, "disable_adapter", nullcontext),
            self._teacher_cache,
        )

"""The loss of a batch of streams: chunked forward with the compressed memory active, cross-entropy on the answers.

It is one module with one forward, so that DistributedDataParallel sees one call and one backward a batch, however many
chunks and questions the streams have.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimem.backbones import Backbone, ChunkInputs
from omnimem.budget import BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.forward import Stream
from omnimem.media import Chunk, MediaError, MediaReader
from omnimem.memory import CompressedCache, SelectionGradient
from omnimem.selection import SelectionMethod
from omnimem.selection.full import Full
from omnimem.stream import StreamSettings
from train.config import DistillConfig
from train.data import Asked, Sample

log = logging.getLogger("omnimem.train")


class StreamObjective(nn.Module):
    """Cross-entropy of the answers to questions asked while the media stream by.

    Parameters
    ----------
    backbone : Backbone
        The model whose forward is run.
    model : nn.Module
        The same model with its trainable adapter: what the optimiser and DDP see.
    profile : BudgetProfile
        Budgets of the memory.
    method : SelectionMethod
        Which positions stay.
    settings : StreamSettings
        How media are read.
    recompute : bool
        Compute each chunk again in the backward instead of keeping its activations.
    distill : DistillConfig, optional
        The same model with everything in view, whose answers the loss also asks for.
    skip_damaged : bool
        Leave a clip that turns out to be damaged half-way out of the loss instead of raising.
    """

    def __init__(
        self,
        backbone: Backbone,
        model: nn.Module,
        profile: BudgetProfile,
        method: SelectionMethod,
        settings: StreamSettings,
        recompute: bool = True,
        distill: DistillConfig | None = None,
        skip_damaged: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self._backbone, self._profile, self._method, self._settings = backbone, profile, method, settings
        self._recompute, self._skip_damaged = recompute, skip_damaged
        self._distill = distill if distill is not None and distill.weight > 0 else None
        self._loss_dtype = torch.promote_types(backbone.model.dtype, torch.float32)

    def forward(
        self,
        samples: list[Sample],
        gradient: SelectionGradient | None = None,
        profile: BudgetProfile | None = None,
    ) -> dict[str, Any]:
        """Run the streams of a batch side by side.

        Parameters
        ----------
        samples : list of Sample
            B rows; shorter streams wait, masked, for the longest.
        gradient : SelectionGradient, optional
            How gradients reach the selection; the loss is the same.
        profile : BudgetProfile, optional
            Budgets of this batch; the objective's own when left out.

        Returns
        -------
        dict
            ``loss``: summed cross-entropy (at least float32, one number) with its graph, and the teacher's part of it;
            ``distilled``: that part by itself, without its weight; ``targets``: answer tokens;
            ``positions``: positions streamed; ``retained``: mean positions a layer holds at the end;
            ``memory_bytes``: bytes of the memory at the end.
        """
        cache = CompressedCache(profile or self._profile, self._method, gradient)
        stream = Stream(self._backbone, cache, self._recompute)
        # What is measured in evaluation are the answers alone.
        distill = self._distill if self.training else None
        teacher = None if distill is None else Stream(self._backbone, CompressedCache(self._profile, Full()))
        opened = [
            replace(self._settings, audio=self._settings.audio and sample.row.audio).open(
                sample.row.media, self._backbone
            )
            for sample in samples
        ]
        encoders = [encoder for _, encoder in opened]
        waiting = [list(sample.asked) for sample in samples]
        loss = torch.zeros((), dtype=self._loss_dtype, device=self._backbone.device)
        distilled = torch.zeros_like(loss)
        targets = positions = 0
        prefix = ChunkInputs.batch([encoder.prefix() for encoder in encoders])
        stream.forward(prefix, text=True)
        if teacher is not None:
            with self._teaching():
                teacher.forward(prefix, text=True)
        readers = [self._chunks(reader, queue) for (reader, _), queue in zip(opened, waiting, strict=True)]
        for chunks in zip_longest(*readers):
            inputs = [e.idle() if c is None else e.encode(c) for e, c in zip(encoders, chunks, strict=True)]
            positions += sum(len(one) for one in inputs)
            chunk = ChunkInputs.batch(inputs)
            stream.step(chunk)
            if teacher is not None:
                with self._teaching():
                    teacher.step(chunk)
            for due in _rounds(waiting, chunks):
                part, taught, count = self._ask(stream, teacher, encoders, due)
                loss, distilled, targets = loss + part, distilled + taught, targets + count
        for due in _rounds(waiting, None):
            part, taught, count = self._ask(stream, teacher, encoders, due)
            loss, distilled, targets = loss + part, distilled + taught, targets + count
        if distill is not None:
            loss = loss + distill.weight * distilled
        if not loss.requires_grad:
            # Every clip of the batch was left out; the backward of all ranks still needs every parameter.
            loss = loss + sum(parameter.sum() * 0 for parameter in self.parameters() if parameter.requires_grad)
        return {
            "loss": loss,
            "distilled": distilled.detach(),
            "targets": targets,
            "positions": positions,
            "retained": cache.mean_counts(),
            "memory_bytes": cache.state_nbytes,
        }

    def _chunks(self, reader: MediaReader, queue: list[Asked]) -> Iterator[Chunk]:
        """Chunks of a clip; if it breaks off and may be skipped, nothing more is asked about it."""
        try:
            yield from reader
        except MediaError as error:
            if not self._skip_damaged:
                raise OmniMemError(f"{error}; data.on_bad_row=skip leaves it out of the training") from error
            log.warning("left out of this step: %s", error)
            queue.clear()

    @contextmanager
    def _teaching(self) -> Iterator[None]:
        """The teacher's model: no gradient, and the base model's weights unless it has the adapter too."""
        assert self._distill is not None
        model: Any = self.model
        with torch.no_grad(), nullcontext() if self._distill.adapter else model.disable_adapter():
            yield

    def _ask(
        self, stream: Stream, teacher: Stream | None, encoders: list[Any], due: list[Asked | None]
    ) -> tuple[Tensor, Tensor, int]:
        """At most one question a sample, asked now: summed cross-entropy, divergence from the teacher, target tokens.

        The divergence is KL(teacher ‖ student) of the answer tokens at temperature T, times T² (Hinton et al., 2015).
        """
        nothing = torch.zeros(0, dtype=torch.int64)
        closing = ChunkInputs.batch([encoder.closing() for encoder in encoders])
        question = [nothing if asked is None else asked.question for asked in due]
        answer = [nothing if asked is None else asked.answer for asked in due]
        logits, targets = stream.answer_logits(closing, question, answer)
        logits = logits.to(self._loss_dtype)
        entropy = F.cross_entropy(logits, targets, reduction="sum")
        if teacher is None or self._distill is None:
            return entropy, torch.zeros_like(entropy), len(targets)
        with self._teaching():
            wanted, _ = teacher.answer_logits(closing, question, answer)
        t = self._distill.temperature
        wanted = (wanted.to(self._loss_dtype) / t).log_softmax(-1)
        divergence = F.kl_div((logits / t).log_softmax(-1), wanted, reduction="sum", log_target=True) * t**2
        return entropy, divergence, len(targets)


def _rounds(waiting: list[list[Asked]], chunks: tuple[Chunk | None, ...] | None) -> Iterator[list[Asked | None]]:
    """Take due questions off `waiting`, one a sample at a time, until none is left.

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
        if not any(due):
            return
        yield due

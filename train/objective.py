"""The loss of a batch of streams: chunked forward with the compressed memory active, cross-entropy on the answers.

It is one module with one forward, so that DistributedDataParallel sees one call and one backward a batch, however many
chunks and questions the streams have.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
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
from omnimem.stream import StreamSettings
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
        skip_damaged: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self._backbone, self._profile, self._method, self._settings = backbone, profile, method, settings
        self._recompute, self._skip_damaged = recompute, skip_damaged
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
            ``loss``: summed cross-entropy (at least float32, one number) with its graph; ``targets``: answer tokens;
            ``positions``: positions streamed; ``retained``: mean positions a layer holds at the end;
            ``memory_bytes``: bytes of the memory at the end.
        """
        cache = CompressedCache(profile or self._profile, self._method, gradient)
        stream = Stream(self._backbone, cache, self._recompute)
        opened = [
            replace(self._settings, audio=self._settings.audio and sample.row.audio).open(
                sample.row.media, self._backbone
            )
            for sample in samples
        ]
        encoders = [encoder for _, encoder in opened]
        waiting = [list(sample.asked) for sample in samples]
        loss = torch.zeros((), dtype=self._loss_dtype, device=self._backbone.device)
        targets = positions = 0
        stream.forward(ChunkInputs.batch([encoder.prefix() for encoder in encoders]), text=True)
        readers = [self._chunks(reader, queue) for (reader, _), queue in zip(opened, waiting, strict=True)]
        for chunks in zip_longest(*readers):
            inputs = [e.idle() if c is None else e.encode(c) for e, c in zip(encoders, chunks, strict=True)]
            positions += sum(len(one) for one in inputs)
            stream.step(ChunkInputs.batch(inputs))
            for due in _rounds(waiting, chunks):
                part, count = self._ask(stream, encoders, due)
                loss, targets = loss + part, targets + count
        for due in _rounds(waiting, None):
            part, count = self._ask(stream, encoders, due)
            loss, targets = loss + part, targets + count
        if not loss.requires_grad:
            # Every clip of the batch was left out; the backward of all ranks still needs every parameter.
            loss = loss + sum(parameter.sum() * 0 for parameter in self.parameters() if parameter.requires_grad)
        return {
            "loss": loss,
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

    def _ask(self, stream: Stream, encoders: list[Any], due: list[Asked | None]) -> tuple[Tensor, int]:
        """Summed loss and number of target tokens of at most one question a sample, asked now."""
        nothing = torch.zeros(0, dtype=torch.int64)
        logits, targets = stream.answer_logits(
            ChunkInputs.batch([encoder.closing() for encoder in encoders]),
            [nothing if asked is None else asked.question for asked in due],
            [nothing if asked is None else asked.answer for asked in due],
        )
        return F.cross_entropy(logits.to(self._loss_dtype), targets, reduction="sum"), len(targets)


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

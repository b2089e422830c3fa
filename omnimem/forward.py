"""The single forward path: chunks into a compressed memory, with gradients in training, without at inference.

    stream = Stream(backbone, CompressedCache(profile, method))
    stream.forward(encoder.prefix(), text=True)
    for chunk in reader:
        stream.step(encoder.encode(chunk))

Training (`omnimem.tape`) and inference (`omnimem.stream`) call nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from omnimem.backbones import Backbone, ChunkInputs
from omnimem.memory import CompressedCache, Eviction
from omnimem.modality import VISUAL
from omnimem.selection import Probe


class Stream:
    """A batch of streams in one compressed memory.

    Under autograd the memory is functional and gradients reach every retained state back to the first chunk (what they
    need grows with the stream; `omnimem.tape` gives the same ones in bounded memory); without it the memory is
    compacted in place.

    Parameters
    ----------
    backbone : Backbone
        The model.
    cache : CompressedCache
        An empty memory.
    """

    def __init__(self, backbone: Backbone, cache: CompressedCache) -> None:
        self.backbone = backbone
        self.cache = cache
        cache.spatial_ids_advance = backbone.spatial_ids_advance

    def step(self, inputs: ChunkInputs, rewindable: bool = False) -> list[Eviction | None]:
        """Take a chunk in and bring every layer back to its budget; returns what `CompressedCache.compress` does."""
        if len(inputs) == 0:
            return [None] * len(self.cache.layers)
        self.forward(inputs)
        for probe in self.cache.method.probes:
            self._ask(probe, len(inputs.embeds))
        return self.cache.compress(rewindable=rewindable)

    @torch.no_grad()
    def _ask(self, probe: Probe, batch: int) -> None:
        ids = self.backbone.question_ids(probe.text) if probe.turn else self.backbone.text_ids(probe.text)
        embeds = self.backbone.embed(ids).expand(batch, -1, -1)
        assert self.cache.next_position_id is not None
        with self.cache.probing(probe, embeds):
            self._run(ChunkInputs.text(embeds, self.cache.next_position_id), text=True)

    def forward(self, inputs: ChunkInputs, text: bool = False) -> Tensor:
        """Append positions to the memory without compressing it.

        Parameters
        ----------
        inputs : ChunkInputs
            The new positions.
        text : bool
            Text around the media or a question: it asks for nothing to be observed for selection.

        Returns
        -------
        Tensor
            Last hidden states ``[B, T, C]``.
        """
        if len(inputs) == 0:
            return inputs.embeds  # nothing ends a media that has not begun
        positions, next_position_id = self.cache.assign_position_ids(
            inputs.position_ids, inputs.modality, inputs.valid, inputs.next_position_id, text
        )
        return self._run(replace(inputs, position_ids=positions, next_position_id=next_position_id), text)

    def _run(self, inputs: ChunkInputs, text: bool) -> Tensor:
        """The decoder on ids that are the memory's own."""
        pictures: dict[str, Any] = {}
        if inputs.deepstack is not None:
            visual = inputs.modality == VISUAL
            pictures = {
                "visual_pos_masks": visual,
                "deepstack_visual_embeds": [layer[visual] for layer in inputs.deepstack],
            }
        return self.backbone.language_model(
            inputs_embeds=inputs.embeds,
            position_ids=inputs.position_ids,
            attention_mask=inputs.valid,
            past_key_values=self.cache,
            use_cache=True,
            modality=None if text else inputs.modality,
            time=inputs.time,
            next_position_id=inputs.next_position_id,
            **pictures,
        ).last_hidden_state

    def answer_logits(
        self, closing: ChunkInputs, question: list[Tensor], answer: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced logits of answers asked now; the memory is left as it was.

        Parameters
        ----------
        closing : ChunkInputs
            Tokens that end the media, one row a sample.
        question, answer : list of Tensor
            Ids ``[Q]`` and ``[A]`` of each sample; an empty answer asks nothing of that sample.

        Returns
        -------
        tuple of Tensor
            Logits ``[M, vocabulary]`` of the M answer positions of all samples and their ids ``[M]``.
        """
        device = self.backbone.device
        text = [torch.cat((q, a))[:-1] if len(a) else q[:0] for q, a in zip(question, answer, strict=True)]
        targets = torch.cat(answer).to(device)
        rows = []
        for i, ids in enumerate(text):
            end = closing.row(i)
            rows.append(end + ChunkInputs.text(self.backbone.embed(ids[None]), end.next_position_id))
        with self.cache.scratch():
            hidden = self.forward(ChunkInputs.batch(rows), text=True)
        predicting = [
            hidden[i, len(row) - len(a) : len(row)] for i, (row, a) in enumerate(zip(rows, answer, strict=True))
        ]
        return self.backbone.lm_head(torch.cat(predicting)), targets

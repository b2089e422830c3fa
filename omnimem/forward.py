"""The single forward path: chunks into a compressed cache.

    stream = Stream(backbone, CompressedCache(profile, method))
    stream.forward(encoder.prefix(), text=True)
    for chunk in reader:
        stream.step(encoder.encode(chunk))

Inference (`omnimem.stream`) and the forward pass of training (`omnimem.bptt`) run without autograd; the backward pass
of training runs each step again with autograd. All of them run through this class.
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
    """A batch of streams in one compressed cache.

    Without autograd the cache is compacted in place. Under autograd it is functional and gradients flow through every
    retained token back to the first chunk; their graph grows with the stream, and `omnimem.bptt` computes the same
    gradients in bounded memory.

    Parameters
    ----------
    backbone : Backbone
        The model.
    cache : CompressedCache
        An empty cache.
    """

    def __init__(self, backbone: Backbone, cache: CompressedCache) -> None:
        self.backbone = backbone
        self.cache = cache
        cache.spatial_ids_advance = backbone.spatial_ids_advance

    def step(self, inputs: ChunkInputs, log_evicted: bool = False) -> list[Eviction | None]:
        """Append a chunk and reduce every layer to its budget; returns the result of `CompressedCache.compress`."""
        if len(inputs) == 0:
            return [None] * len(self.cache.layers)
        self.forward(inputs)
        for probe in self.cache.method.probes:
            self._run_probe(probe, len(inputs.embeds))
        return self.cache.compress(log_evicted=log_evicted)

    @torch.no_grad()
    def _run_probe(self, probe: Probe, batch: int) -> None:
        ids = self.backbone.question_ids(probe.text) if probe.as_user_turn else self.backbone.text_ids(probe.text)
        embeds = self.backbone.embed(ids).expand(batch, -1, -1)
        assert self.cache.next_position_id is not None
        with self.cache.probing(probe, embeds):
            self._run(ChunkInputs.text(embeds, self.cache.next_position_id), text=True)

    def forward(self, inputs: ChunkInputs, text: bool = False) -> Tensor:
        """Append tokens to the cache without compressing it.

        Parameters
        ----------
        inputs : ChunkInputs
            The new tokens.
        text : bool
            Text around the media or a question: the selection method observes nothing.

        Returns
        -------
        Tensor
            Last hidden states ``[B, T, C]``.
        """
        if len(inputs) == 0:
            return inputs.embeds  # closing tokens of media that have not begun
        position_ids, next_position_id = self.cache.assign_position_ids(
            inputs.position_ids, inputs.modality, inputs.valid, inputs.next_position_id, text
        )
        return self._run(replace(inputs, position_ids=position_ids, next_position_id=next_position_id), text)

    def _run(self, inputs: ChunkInputs, text: bool) -> Tensor:
        """Run the decoder on position ids of this cache."""
        deepstack: dict[str, Any] = {}
        if inputs.deepstack is not None:
            visual = inputs.modality == VISUAL
            deepstack = {
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
            **deepstack,
        ).last_hidden_state

    def answer_logits(
        self, closing: ChunkInputs, question: list[Tensor], answer: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced logits of answers to questions asked now; the cache is left as it was.

        Parameters
        ----------
        closing : ChunkInputs
            Tokens that end the media, one row per sample.
        question, answer : list of Tensor
            Token ids ``[Q]`` and ``[A]`` of each sample; samples with an empty answer are skipped.

        Returns
        -------
        tuple of Tensor
            Logits ``[M, vocabulary]`` that predict the M answer tokens of all samples, and their ids ``[M]``.
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

"""`ChunkInputs`: the decoder inputs of one step of a stream, as a batch with padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from omnimem.modality import TEXT


@dataclass(frozen=True)
class ChunkInputs:
    """Decoder inputs of one step of a stream: B samples of T tokens.

    Attributes
    ----------
    embeds : Tensor
        ``[B, T, C]`` input embeddings.
    position_ids : Tensor
        int64 ``[3, B, T]`` rotary coordinates (time, height, width); float32 for models with fractional ids.
    modality : Tensor
        int8 ``[B, T]``, see `omnimem.modality`.
    time : Tensor
        float32 ``[B, T]`` seconds since the start of the media; NaN for text and for closing tokens.
    next_position_id : Tensor
        ``[B]``, dtype of `position_ids`: id of the text token that follows.
    valid : Tensor or None
        bool ``[B, T]``, False for padding; None without padding.
    deepstack : Tensor or None
        ``[L, B, T, C]`` features added to the outputs of the first L decoder layers, zero except for visual tokens;
        None for models without DeepStack (arXiv 2406.04334).
    """

    embeds: Tensor
    position_ids: Tensor
    modality: Tensor
    time: Tensor
    next_position_id: Tensor
    valid: Tensor | None = None
    deepstack: Tensor | None = None

    def __len__(self) -> int:
        return self.embeds.shape[1]

    @classmethod
    def text(cls, embeds: Tensor, start: int | Tensor) -> ChunkInputs:
        """Inputs for text embeddings ``[B, T, C]``; position ids count up from `start` (an int, or ``[B]``)."""
        batch, length, _ = embeds.shape
        first = torch.as_tensor(start, device=embeds.device).expand(batch)
        ids = first[:, None] + torch.arange(length, device=embeds.device)
        return cls(
            embeds=embeds,
            position_ids=ids.expand(3, -1, -1),
            modality=torch.full((batch, length), TEXT, dtype=torch.int8, device=embeds.device),
            time=torch.full((batch, length), torch.nan, device=embeds.device),
            next_position_id=first + length,
        )

    @classmethod
    def batch(cls, samples: Sequence[ChunkInputs]) -> ChunkInputs:
        """Collate samples of batch size 1 into one batch, padded on the right."""
        if len(samples) == 1:
            return samples[0]

        def pad(tensors: list[Tensor], fill: float = 0) -> Tensor:
            return pad_sequence(tensors, batch_first=True, padding_value=fill)

        lengths = torch.tensor([len(sample) for sample in samples])
        width = int(lengths.max())
        device = samples[0].embeds.device
        position_ids = pad([sample.position_ids[:, 0].T for sample in samples])
        deepstack = None
        if (layers := _deepstack_layers(samples)) > 0:
            padded = pad([sample._deepstack(layers)[:, 0].transpose(0, 1) for sample in samples])
            deepstack = padded.permute(2, 0, 1, 3)
        return cls(
            embeds=pad([sample.embeds[0] for sample in samples]),
            position_ids=position_ids.permute(2, 0, 1),
            modality=pad([sample.modality[0] for sample in samples]),
            time=pad([sample.time[0] for sample in samples], torch.nan),
            next_position_id=torch.cat([sample.next_position_id for sample in samples]),
            valid=(torch.arange(width) < lengths[:, None]).to(device),
            deepstack=deepstack,
        )

    def row(self, sample: int) -> ChunkInputs:
        """Inputs of one sample, batch size 1, without padding."""
        tokens = slice(None) if self.valid is None else self.valid[sample]
        return ChunkInputs(
            embeds=self.embeds[sample, tokens][None],
            position_ids=self.position_ids[:, sample, tokens][:, None],
            modality=self.modality[sample, tokens][None],
            time=self.time[sample, tokens][None],
            next_position_id=self.next_position_id[sample : sample + 1],
            deepstack=None if self.deepstack is None else self.deepstack[:, sample, tokens][:, None],
        )

    def __add__(self, later: ChunkInputs) -> ChunkInputs:
        """Concatenate along the sequence: `self`, then `later` (same batch, no padding)."""
        layers = _deepstack_layers((self, later))
        return ChunkInputs(
            embeds=torch.cat((self.embeds, later.embeds), 1),
            position_ids=torch.cat((self.position_ids, later.position_ids), 2),
            modality=torch.cat((self.modality, later.modality), 1),
            time=torch.cat((self.time, later.time), 1),
            next_position_id=later.next_position_id,
            deepstack=torch.cat((self._deepstack(layers), later._deepstack(layers)), 2) if layers > 0 else None,
        )

    def _deepstack(self, layers: int) -> Tensor:
        """`deepstack` ``[layers, B, T, C]``, zeros where there is none."""
        return self.embeds.new_zeros(layers, *self.embeds.shape) if self.deepstack is None else self.deepstack


def _deepstack_layers(inputs: Sequence[ChunkInputs]) -> int:
    """Largest number of DeepStack layers among the inputs; 0 if none has any."""
    return max(0 if one.deepstack is None else len(one.deepstack) for one in inputs)

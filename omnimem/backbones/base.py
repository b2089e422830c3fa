"""What every backbone offers, so that streaming and training never ask which model they run.

A backbone folder holds what differs between models: tokens around the media (`prompt`), how picture and sound become
positions (`stream_encoder`), checkpoint keys and loading (`backbone`), a tiny offline stand-in (`tiny`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from omnimem.media import Chunk
from omnimem.modality import TEXT


@dataclass(frozen=True)
class ChunkInputs:
    """One step of a stream, ready for the language model.

    Attributes
    ----------
    embeds : Tensor
        ``[B, T, C]`` input embeddings.
    positions : Tensor
        int64 (float32 where a model counts in fractions) ``[3, B, T]`` rotary ids (time, height, width).
    modality : Tensor
        int8 ``[B, T]``, see `omnimem.modality`.
    time : Tensor
        float32 ``[B, T]`` seconds into the media; NaN for text.
    next_position_id : Tensor
        ``[B]``, dtype of `positions`: rotary position of the text that follows.
    valid : Tensor or None
        bool ``[B, T]``, False for padding; None when there is none.
    deepstack : Tensor or None
        ``[L, B, T, C]``: what is added to the hidden states behind each of the first L decoder layers, zero but for
        pictures; None for models without (DeepStack, https://arxiv.org/abs/2406.04334).
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
        """Text embeddings ``[B, T, C]`` whose positions count up from `start` (one number, or one a sample)."""
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
        """Put samples of one row each side by side, shorter ones padded at the end."""
        if len(samples) == 1:
            return samples[0]

        def pad(columns: list[Tensor], fill: float = 0) -> Tensor:
            return pad_sequence(columns, batch_first=True, padding_value=fill)

        lengths = torch.tensor([len(sample) for sample in samples])
        width = int(lengths.max())
        device = samples[0].embeds.device
        positions = pad([sample.position_ids[:, 0].T for sample in samples])
        deepstack = None
        if (layers := _deepstack_layers(samples)) > 0:
            rows = pad([sample._deepstack(layers)[:, 0].transpose(0, 1) for sample in samples])
            deepstack = rows.permute(2, 0, 1, 3)
        return cls(
            embeds=pad([sample.embeds[0] for sample in samples]),
            position_ids=positions.permute(2, 0, 1),
            modality=pad([sample.modality[0] for sample in samples]),
            time=pad([sample.time[0] for sample in samples], torch.nan),
            next_position_id=torch.cat([sample.next_position_id for sample in samples]),
            valid=(torch.arange(width) < lengths[:, None]).to(device),
            deepstack=deepstack,
        )

    def row(self, sample: int) -> ChunkInputs:
        """One sample of the batch, without its padding."""
        real = slice(None) if self.valid is None else self.valid[sample]
        return ChunkInputs(
            embeds=self.embeds[sample, real][None],
            position_ids=self.position_ids[:, sample, real][:, None],
            modality=self.modality[sample, real][None],
            time=self.time[sample, real][None],
            next_position_id=self.next_position_id[sample : sample + 1],
            deepstack=None if self.deepstack is None else self.deepstack[:, sample, real][:, None],
        )

    def __add__(self, later: ChunkInputs) -> ChunkInputs:
        """The positions of `self` followed by those of `later` (same batch, no padding)."""
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
        """The same, of so many layers, where there may be none."""
        return self.embeds.new_zeros(layers, *self.embeds.shape) if self.deepstack is None else self.deepstack


def _deepstack_layers(inputs: Sequence[ChunkInputs]) -> int:
    return max(0 if one.deepstack is None else len(one.deepstack) for one in inputs)


class StreamEncoder(ABC):
    """Turns one media file, chunk by chunk, into language-model inputs; holds the place in the stream."""

    @abstractmethod
    def prefix(self) -> ChunkInputs:
        """Everything before the first frame: system and user turn, opening tokens."""

    @abstractmethod
    def encode(self, chunk: Chunk) -> ChunkInputs:
        """Picture and sound of the next chunk."""

    def fork(self) -> StreamEncoder:
        """Another encoder at the same place of the stream."""
        return copy(self)

    @property
    def has_pending_input(self) -> bool:
        """Whether something that was read waits for a later chunk or for the end."""
        return False

    @abstractmethod
    def empty_step(self) -> ChunkInputs:
        """A step of no positions, for a sample of a batch whose media has ended."""

    @abstractmethod
    def closing(self) -> ChunkInputs:
        """Tokens that end the media, at the present place of the stream."""


class Backbone(ABC):
    """A loaded audio-visual language model.

    Attributes
    ----------
    name : str
        Folder and recipe name of the backbone.
    model_id : str
        Where it was loaded from.
    model : PreTrainedModel
        The stock generating class.
    processor, tokenizer
        The stock processor and its tokenizer.
    projectors : dict
        Modules between the encoders and the decoder that may be trained, by the name recipes know them by.
    whole : tuple of str
        Modules whose linear layers are never quantised.
    spatial_ids_advance : bool
        Whether height and width ids of pictures count from the present place of the stream, not from its start.
    hears : bool
        Whether it takes sound; of media for one that does not only the picture is read.
    """

    name: str
    model_id: str
    model: Any
    processor: Any
    tokenizer: Any
    projectors: ClassVar[dict[str, str]]
    skip_quantization_modules: ClassVar[tuple[str, ...]]
    supports_audio: ClassVar[bool] = True
    spatial_ids_advance: ClassVar[bool] = False

    model_types: ClassVar[tuple[str, ...]]

    @classmethod
    def claims(cls, config: dict[str, Any]) -> bool:
        """Whether a checkpoint with this configuration file is one of this backbone's."""
        return config.get("model_type") in cls.model_types

    @property
    @abstractmethod
    def language_model(self) -> Any:
        """The stock decoder inside `model`; a `CompressedCache` is already attached."""

    @property
    @abstractmethod
    def lm_head(self) -> nn.Module:
        """Hidden states → logits."""

    @abstractmethod
    def stream_encoder(
        self,
        *,
        video: bool,
        audio: bool,
        fps: float,
        duration: float | None = None,
        time_scale: float | str = "auto",
        max_pixels: int | None = None,
        position_layout: str = "train",
        timestamps: int | None = None,
    ) -> StreamEncoder:
        """Begin a stream.

        Parameters
        ----------
        picture, sound : bool
            What the media has.
        fps : float
            Frames a second that will be streamed.
        duration : float, optional
            Seconds of media.
        time_scale : float or "auto"
            Factor on the rotary ids a second; ``auto`` lowers it only for streams past the trained range.
        max_pixels : int, optional
            Upper limit of the pixels of a resized frame; the model's own when left out.
        position_layout : {"train", "release"}
            Where a model's published code differs from how it was trained (video-SALMONN 2+ 3B and 7B).
        timestamps : int, optional
            Most times written between the pictures, for models that do so; one a temporal patch when left out.
        """

    @abstractmethod
    def chunk_alignment(self, fps: float, audio: bool = True) -> float:
        """Seconds that every chunk length must be a multiple of, so that encoders stay exact at its edges."""

    @abstractmethod
    def tokens_per_chunk(
        self,
        *,
        frame_size: tuple[int, int] | None,
        audio: bool,
        fps: float,
        seconds: float,
        chunk_seconds: float,
        max_pixels: int | None = None,
    ) -> list[tuple[int, int]]:
        """Visual and audio positions of each chunk of a file with frames of `frame` (height, width)."""

    def text_tokens(self, fps: float, seconds: float, timestamps: int | None) -> int:
        """Positions of text between the pictures of a stream (see `stream_encoder`), which stay in memory."""
        return 0

    @abstractmethod
    def question_ids(self, question: str) -> Tensor:
        """int64 ``[1, Q]``: the question and the start of the assistant's turn."""

    @abstractmethod
    def answer_ids(self, answer: str) -> Tensor:
        """int64 ``[1, A]``: an answer with the token that ends it."""

    @property
    @abstractmethod
    def end_token_ids(self) -> list[int]:
        """Tokens that end an answer."""

    @abstractmethod
    def set_rope_deltas(self, deltas: Tensor) -> None:
        """Tell `model.generate` what to add to its count of tokens (``[B, 1]``)."""

    @abstractmethod
    def lora_target_regex(self, names: Sequence[str]) -> str:
        """Regular expression that matches the named projections of the language model and nothing else."""

    @property
    def config(self) -> Any:
        """Configuration of the stock model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the language model lives."""
        return self.language_model.device

    def text_ids(self, text: str) -> Tensor:
        """int64 ``[1, T]``: a text by itself."""
        return self.tokenizer(text, return_tensors="pt").input_ids

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings ``[B, T, C]`` of ids ``[B, T]``."""
        return self.language_model.get_input_embeddings()(ids.to(self.device))

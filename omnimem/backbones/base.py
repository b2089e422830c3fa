"""Interface that streaming and training code uses, whichever model it runs; `QwenBackbone` adds loading.

A backbone's folder holds `backbone.py` (model class and module names), `tiny.py` (a tiny random model for tests) and,
unless it shares one, `stream_encoder.py` (chunks of media to decoder inputs). The README of this folder describes how
to add a backbone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from omnimem.backbones.chunk_inputs import ChunkInputs
from omnimem.media import Chunk


class StreamEncoder(ABC):
    """Encode one media file chunk by chunk into decoder inputs.

    An encoder has state: the next position id, how much it has encoded, and what a later chunk needs of earlier ones.
    """

    @abstractmethod
    def prefix(self) -> ChunkInputs:
        """Tokens before the media: system prompt, start of the user turn, start-of-media tokens."""

    @abstractmethod
    def encode(self, chunk: Chunk) -> ChunkInputs:
        """Video and audio tokens of the next chunk."""

    def fork(self) -> StreamEncoder:
        """Copy of this encoder with its own state."""
        return copy(self)

    @property
    def has_pending_input(self) -> bool:
        """Whether encoded tokens are buffered until a later chunk or the end of the media."""
        return False

    @abstractmethod
    def empty_step(self) -> ChunkInputs:
        """Inputs without tokens, for a sample of a batch whose media has ended."""

    @abstractmethod
    def closing(self) -> ChunkInputs:
        """Tokens that end the media, if it ended now; the state does not change."""


class Backbone(ABC):
    """A loaded audio-visual language model.

    Attributes
    ----------
    name : str
        Name of the backbone: its key in `BACKBONES`, and ``model.backbone`` in recipes.
    model_id : str
        Folder or hub id the model was loaded from.
    model : PreTrainedModel
        The transformers model with a language-modelling head.
    processor, tokenizer
        The transformers processor and its tokenizer.
    projectors : dict
        Trainable modules between the encoders and the decoder: name in recipes → name in the model.
    skip_quantization_modules : tuple of str
        Modules whose linear layers are not quantized.
    supports_audio : bool
        Whether the model accepts audio; the audio track is ignored otherwise.
    spatial_ids_advance : bool
        True: height and width ids of a frame start at the current position id, so they grow along the stream. False:
        they start at the same id in every frame.
    model_types : tuple of str
        Values of ``model_type`` in the configuration files of this backbone's checkpoints.
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
    def matches_config(cls, config: dict[str, Any]) -> bool:
        """Whether `config`, the content of a ``config.json``, belongs to a checkpoint of this backbone."""
        return config.get("model_type") in cls.model_types

    @property
    @abstractmethod
    def language_model(self) -> Any:
        """The decoder of `model`, prepared for `CompressedCache` (see `omnimem.memory.attach`)."""

    @property
    @abstractmethod
    def lm_head(self) -> nn.Module:
        """Output projection: hidden states ``[B, T, C]`` to logits ``[B, T, V]``."""

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
        """Create the encoder of one stream.

        Parameters
        ----------
        video, audio : bool
            Whether the media has video, audio.
        fps : float
            Sampled frames per second.
        duration : float, optional
            Seconds of media, if known.
        time_scale : float or "auto"
            Factor on the time ids per second; ``auto`` lowers it only for streams longer than the trained range of ids.
        max_pixels : int, optional
            Upper limit for the pixels of a resized frame; default: the model's own limit.
        position_layout : {"train", "release"}
            Position ids as in training or as in the released inference code, for models where the two differ
            (video-SALMONN 2+ 3B, 7B and 72B).
        timestamps : int, optional
            Maximum number of timestamps written between frames, for models that write them; default: one per temporal
            patch.

        Raises
        ------
        OmniMemError
            Neither video nor audio, audio only for a model without audio support, or a value that the model
            cannot apply. Options that do not concern the model are ignored.
        """

    @abstractmethod
    def chunk_alignment(self, fps: float, audio: bool = True) -> float:
        """Seconds of which the chunk length must be a multiple: then encoding by chunks equals encoding the clip."""

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
        """Numbers of video and of audio tokens of each chunk, without reading the file.

        Parameters
        ----------
        frame_size : tuple of int, optional
            Height and width in pixels; None without video.
        audio : bool
            Whether the file has audio.
        fps, seconds, chunk_seconds : float
            Sampled frames per second, duration of the file and of a chunk.
        max_pixels : int, optional
            See `stream_encoder`.
        """

    def text_tokens(self, fps: float, seconds: float, timestamps: int | None) -> int:
        """Number of text tokens between the frames of a stream (timestamps); they are never evicted."""
        return 0

    @abstractmethod
    def question_ids(self, question: str) -> Tensor:
        """Token ids int64 ``[1, Q]``: the question and the start of the assistant turn."""

    @abstractmethod
    def answer_ids(self, answer: str) -> Tensor:
        """Token ids int64 ``[1, A]``: the answer and its end token."""

    @property
    @abstractmethod
    def end_token_ids(self) -> list[int]:
        """Ids of the tokens that end an answer."""

    @abstractmethod
    def set_rope_deltas(self, deltas: Tensor) -> None:
        """Set the offset ``[B, 1]`` that `model.generate` adds to its token count to get position ids."""

    @abstractmethod
    def lora_target_regex(self, names: Sequence[str]) -> str:
        """Regular expression for PEFT's `target_modules`: these projections (``q_proj``…) of the decoder only."""

    @property
    def config(self) -> Any:
        """Configuration of the transformers model."""
        return self.model.config

    @property
    def position_id_dtype(self) -> torch.dtype:
        """Dtype of the position ids that stream encoders assign."""
        return torch.int64

    @property
    def device(self) -> torch.device:
        """Device of the decoder."""
        return self.language_model.device

    def text_ids(self, text: str) -> Tensor:
        """Token ids int64 ``[1, T]`` of a text."""
        return self.tokenizer(text, return_tensors="pt").input_ids

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings ``[B, T, C]`` of token ids ``[B, T]``."""
        return self.language_model.get_input_embeddings()(ids.to(self.device))

"""What the Qwen audio-visual models and their descendants share: ChatML, frame sizes, module names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from omnimem.backbones.audio_encoder import AudioEncoder
from omnimem.backbones.base import Backbone
from omnimem.backbones.checkpoint import load_pretrained, load_processor
from omnimem.backbones.layout import LayoutEncoder, common_multiple, patches_per_timestamp
from omnimem.backbones.vision import PixelLimits
from omnimem.memory import attach

ANSWER_END = "<|im_end|>"
"""Token that ends a turn."""


class QwenBackbone(Backbone):
    """A model that speaks ChatML and sees through a Qwen vision tower.

    Parameters
    ----------
    model : PreTrainedModel
        Loaded stock model.
    processor : ProcessorMixin
        Its processor.
    model_id : str
        Where it came from.

    Attributes
    ----------
    encoder_class : type
        Layout of its streams.
    system_prompt : str or None
        What the model was trained to find before the user's turn.
    frame_tokens : tuple of int
        Fewest and most positions of a resized frame by default (before two frames become one temporal patch).
    """

    model_class: ClassVar[Any]
    processor_class: ClassVar[Any]
    encoder_class: ClassVar[type[LayoutEncoder]]
    system_prompt: ClassVar[str | None] = None
    frame_tokens: ClassVar[tuple[int, int]] = (128, 768)

    def __init__(self, model: Any, processor: Any, model_id: str = "") -> None:
        self.model, self.processor, self.model_id = model, processor, model_id
        self.tokenizer = processor.tokenizer
        attach(self.language_model)

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype, device: torch.device | str, load_in_4bit: bool = False
    ) -> QwenBackbone:
        """Load a checkpoint folder or hub id; every weight must be there (see `load_pretrained`)."""
        quantized = cls.skip_quantization_modules if load_in_4bit else None
        model = load_pretrained(cls.model_class, path, dtype, device, quantized)
        return cls(model, load_processor(cls.processor_class, path), str(path))

    @property
    def language_model(self) -> Any:
        """The stock text decoder."""
        return self.model.model.language_model

    @property
    def lm_head(self) -> nn.Module:
        """The output projection."""
        return self.model.lm_head

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
        **more: Any,
    ) -> LayoutEncoder:
        """Begin a stream in the model's layout; see `Backbone.stream_encoder`, and `encoder_class` for `more`."""
        return self.encoder_class(
            self,
            video=video,
            audio=audio,
            fps=fps,
            duration=duration,
            time_scale=time_scale,
            max_pixels=max_pixels,
            position_layout=position_layout,
            timestamps=timestamps,
            **more,
        )

    def audio_encoder(self) -> AudioEncoder | None:
        """What makes embeddings of sound, in layouts that take any (see `AudioEncoder`)."""
        return None

    def pixel_limits(self, max_pixels: int | None = None) -> PixelLimits:
        """Limits of a resized frame: the model's own, never above what its video processor or the caller allows."""
        processor = self.processor.video_processor
        factor = processor.patch_size * processor.merge_size
        least, most = (tokens * factor**2 for tokens in self.frame_tokens)
        most = min(most, processor.size["longest_edge"], max_pixels or most)
        return PixelLimits(min(least, most), most, factor)

    @property
    def temporal_patch(self) -> int:
        """Frames of a temporal patch."""
        return self.config.vision_config.temporal_patch_size

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
        """Temporal patches times positions of a resized frame, and what `audio_tokens` says."""
        per_patch = 0 if frame_size is None else self.pixel_limits(max_pixels).tokens(*frame_size)
        chunks = []
        for number in range(math.ceil(seconds / chunk_seconds)):
            length = min(chunk_seconds, seconds - number * chunk_seconds)
            patches = math.ceil(math.ceil(length * fps) / self.temporal_patch)
            chunks.append((patches * per_patch, self.audio_tokens(length) if audio and self.supports_audio else 0))
        return chunks

    def text_tokens(self, fps: float, seconds: float, timestamps: int | None) -> int:
        """The times between the pictures of models that write them, and the tokens around each group of pictures."""
        if not self.spatial_ids_advance:
            return 0
        patches = math.ceil(math.ceil(seconds * fps) / self.temporal_patch)
        groups = math.ceil(patches / patches_per_timestamp(patches, timestamps))
        return groups * (self.text_ids(f"<{seconds:.1f} seconds>").shape[1] + 2)

    def audio_tokens(self, seconds: float) -> int:
        """Positions that so much sound becomes."""
        raise NotImplementedError(f"{self.name} does not support audio")

    @property
    def opening(self) -> str:
        """Text before the media: system turn, where the model has one, and the start of the user's."""
        system = "" if self.system_prompt is None else f"<|im_start|>system\n{self.system_prompt}{ANSWER_END}\n"
        return f"{system}<|im_start|>user\n"

    def question_turn(self, question: str) -> str:
        """Text after the media: the question and the start of the assistant's turn."""
        return f"{question}{ANSWER_END}\n<|im_start|>assistant\n"

    def question_ids(self, question: str) -> Tensor:
        """ChatML: the question, end of the user's turn, start of the assistant's."""
        return self.text_ids(self.question_turn(question))

    def answer_ids(self, answer: str) -> Tensor:
        """The answer and ``<|im_end|>``."""
        return self.text_ids(answer + ANSWER_END)

    @property
    def vision_start(self) -> int:
        """Id of the token before pictures."""
        return self.config.vision_start_token_id

    @property
    def vision_end(self) -> int:
        """Id of the token behind them."""
        return self.config.vision_end_token_id

    def chunk_alignment(self, fps: float, audio: bool = True) -> float:
        """Whole temporal patches."""
        return common_multiple(self.temporal_patch / fps)

    def token_id(self, name: str) -> int:
        """Id of a special token by its spelling."""
        return self.tokenizer.convert_tokens_to_ids(name)

    @property
    def end_token_ids(self) -> list[int]:
        """``<|im_end|>`` and the tokenizer's own end and padding tokens."""
        known = (self.token_id(ANSWER_END), self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        return sorted(set(known) - {None})

    def set_rope_deltas(self, deltas: Tensor) -> None:
        """State on the stock model, which a second video would inherit: set before every generation."""
        self.model.model.rope_deltas = deltas

    def lora_target_regex(self, names: Sequence[str]) -> str:
        """Projections of the decoder layers; the encoders have modules of the same names."""
        return rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(names)})"

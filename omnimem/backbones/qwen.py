"""Implementation of `Backbone` that all models share: loading, prompts, frame sizes.

The defaults (ChatML prompts, frame sizes, module names) are those of Qwen-VL models.
"""

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

TURN_END = "<|im_end|>"
"""Token that ends a turn (ChatML)."""


class TransformersBackbone(Backbone):
    """A transformers model; by default with ChatML prompts and a vision tower that encodes temporal patches.

    Parameters
    ----------
    model : PreTrainedModel
        Loaded transformers model; its decoder is prepared for `CompressedCache`.
    processor : ProcessorMixin
        Its processor.
    model_id : str
        Folder or hub id it was loaded from.

    Attributes
    ----------
    encoder_class : type
        Stream encoder.
    system_prompt : str or None
        Text of the system turn, if the model was trained with one.
    frame_tokens : tuple of int
        Default minimum and maximum number of tokens per resized frame.
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
    ) -> TransformersBackbone:
        """Load a checkpoint from a folder or the hub (see `load_pretrained`)."""
        quantized = cls.skip_quantization_modules if load_in_4bit else None
        model = load_pretrained(cls.model_class, path, dtype, device, quantized)
        return cls(model, load_processor(cls.processor_class, path), str(path))

    @property
    def language_model(self) -> Any:
        """Text decoder of the model."""
        return self.model.model.language_model

    @property
    def lm_head(self) -> nn.Module:
        """The output projection."""
        return self.model.lm_head

    @property
    def position_id_dtype(self) -> torch.dtype:
        """Dtype of the position ids that `encoder_class` assigns."""
        return self.encoder_class.id_dtype

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
        """Create the encoder of one stream; see `Backbone.stream_encoder`, and `encoder_class` for `more`."""
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
        """Separate audio encoder of models that have one (video-SALMONN 2+)."""
        return None

    def pixel_limits(self, max_pixels: int | None = None) -> PixelLimits:
        """Limits of a resized frame: the model's, lowered to those of the video processor and to `max_pixels`."""
        processor = self.processor.video_processor
        factor = processor.patch_size * processor.merge_size
        least, most = (tokens * factor**2 for tokens in self.frame_tokens)
        most = min(most, processor.size["longest_edge"], max_pixels or most)
        return PixelLimits(min(least, most), most, factor)

    @property
    def temporal_patch(self) -> int:
        """Frames per temporal patch."""
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
        """Temporal patches times tokens per resized frame, and `audio_tokens`; see `Backbone.tokens_per_chunk`."""
        per_patch = 0 if frame_size is None else self.pixel_limits(max_pixels).tokens(*frame_size)
        chunks = []
        for number in range(math.ceil(seconds / chunk_seconds)):
            length = min(chunk_seconds, seconds - number * chunk_seconds)
            patches = math.ceil(math.ceil(length * fps) / self.temporal_patch)
            chunks.append((patches * per_patch, self.audio_tokens(length) if audio and self.supports_audio else 0))
        return chunks

    def text_tokens(self, fps: float, seconds: float, timestamps: int | None) -> int:
        """Timestamps, and start and end token of each group of patches, for models that write timestamps."""
        # Of the models that use this method, only those with advancing ids write timestamps.
        if not self.spatial_ids_advance:
            return 0
        patches = math.ceil(math.ceil(seconds * fps) / self.temporal_patch)
        groups = math.ceil(patches / patches_per_timestamp(patches, timestamps))
        return groups * (self.text_ids(f"<{seconds:.1f} seconds>").shape[1] + 2)

    def audio_tokens(self, seconds: float) -> int:
        """Number of audio tokens for `seconds` of audio."""
        raise NotImplementedError(f"{self.name} does not support audio")

    @property
    def prompt_prefix(self) -> str:
        """Text before the media: the system turn, if any, and the start of the user turn."""
        system = "" if self.system_prompt is None else f"<|im_start|>system\n{self.system_prompt}{TURN_END}\n"
        return f"{system}<|im_start|>user\n"

    def question_turn(self, question: str) -> str:
        """Text after the media: the question and the start of the assistant turn."""
        return f"{question}{TURN_END}\n<|im_start|>assistant\n"

    def question_ids(self, question: str) -> Tensor:
        """Token ids of `question_turn`, int64 ``[1, Q]``."""
        return self.text_ids(self.question_turn(question))

    def answer_ids(self, answer: str) -> Tensor:
        """Token ids of the answer and ``<|im_end|>``, int64 ``[1, A]``."""
        return self.text_ids(answer + TURN_END)

    @property
    def vision_start(self) -> int:
        """Id of the token that starts video."""
        return self.config.vision_start_token_id

    @property
    def vision_end(self) -> int:
        """Id of the token that ends video."""
        return self.config.vision_end_token_id

    def chunk_alignment(self, fps: float, audio: bool = True) -> float:
        """Whole temporal patches."""
        return common_multiple(self.temporal_patch / fps)

    def token_id(self, name: str) -> int:
        """Id of a special token, such as ``<|im_end|>``."""
        return self.tokenizer.convert_tokens_to_ids(name)

    @property
    def end_token_ids(self) -> list[int]:
        """``<|im_end|>`` and the tokenizer's own end and padding tokens."""
        known = (self.token_id(TURN_END), self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        return sorted(set(known) - {None})

    def set_rope_deltas(self, deltas: Tensor) -> None:
        """Set before every generation: the model keeps the value of the previous one otherwise."""
        self.model.model.rope_deltas = deltas

    def lora_target_regex(self, names: Sequence[str]) -> str:
        """Projections of the decoder layers; bare names would also match modules of the encoders."""
        return rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(names)})"

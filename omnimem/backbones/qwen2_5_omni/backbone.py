"""Qwen2.5-Omni's thinker on stock transformers classes: loading, tokens, what generation and LoRA need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

from omnimem.backbones.base import Backbone
from omnimem.backbones.checkpoint import load_stock
from omnimem.backbones.qwen2_5_omni.prompt import ANSWER_END, question_turn
from omnimem.backbones.qwen2_5_omni.stream_encoder import (
    AUDIO_TOKENS_PER_SECOND,
    Qwen2_5OmniStreamEncoder,
    chunk_alignment,
)
from omnimem.backbones.qwen2_5_omni.tiny import build_tiny
from omnimem.memory import attach

MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 768 * 28 * 28
"""Pixels of a resized frame by default: what the stock processor passes to its video processor (128 to 768 tokens)."""


class Qwen2_5Omni(Backbone):
    """The thinker: sees and hears a stream, answers in text.

    Parameters
    ----------
    model : Qwen2_5OmniThinkerForConditionalGeneration
        Loaded stock model.
    processor : Qwen2_5OmniProcessor
        Its processor.
    model_id : str
        Where it came from.
    """

    name = "qwen2_5_omni"
    model_types = ("qwen2_5_omni", "qwen2_5_omni_thinker")
    model_class = Qwen2_5OmniThinkerForConditionalGeneration
    projectors: ClassVar[dict[str, str]] = {"visual": "visual.merger", "audio": "audio_tower.proj"}
    whole: ClassVar[tuple[str, ...]] = ("model.visual", "model.audio_tower", "lm_head")
    build_tiny = staticmethod(build_tiny)

    def __init__(self, model: Any, processor: Any, model_id: str = "") -> None:
        self.model, self.processor, self.model_id = model, processor, model_id
        self.tokenizer = processor.tokenizer
        self.token_ids = {
            name: self.tokenizer.convert_tokens_to_ids(getattr(self.tokenizer, f"{name}_token"))
            for name in ("vision_bos", "vision_eos", "audio_bos", "audio_eos")
        }
        attach(self.language_model)

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype, device: torch.device | str, quantize: bool = False
    ) -> Qwen2_5Omni:
        """Load a checkpoint folder or hub id; every weight of the thinker must be there (see `load_stock`)."""
        quantized = cls.whole if quantize else None
        model, processor = load_stock(cls.model_class, Qwen2_5OmniProcessor, path, dtype, device, quantized)
        return cls(model, processor, str(path))

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
        picture: bool,
        sound: bool,
        fps: float,
        duration: float | None = None,
        time_scale: float | str = "auto",
        max_pixels: int | None = None,
        mel_floor: float | str = "running",
    ) -> Qwen2_5OmniStreamEncoder:
        """Begin a stream.

        Parameters
        ----------
        picture, sound : bool
            What the media has.
        fps : float
            Frames a second that will be streamed.
        duration : float, optional
            Seconds of media, for `time_scale="auto"`.
        time_scale : float or "auto"
            Factor on the 25 rotary ids a second; ``auto`` lowers it only for streams past the trained range.
        max_pixels : int, optional
            Upper limit of the pixels of a resized frame; the processor's own when left out.
        mel_floor : float or "running"
            See `MelStream`.
        """
        return Qwen2_5OmniStreamEncoder(
            self,
            picture=picture,
            sound=sound,
            fps=fps,
            duration=duration,
            time_scale=time_scale,
            max_pixels=max_pixels,
            mel_floor=mel_floor,
        )

    def frame_limits(self, max_pixels: int | None = None) -> dict[str, int]:
        """Fewest and most pixels of a resized frame, in the words of the stock video processor's ``size``.

        The stock processor's limits, never above what the checkpoint's video processor or the caller allows.
        """
        longest = min(MAX_PIXELS, self.processor.video_processor.size["longest_edge"], max_pixels or MAX_PIXELS)
        return {"shortest_edge": min(MIN_PIXELS, longest), "longest_edge": longest}

    def chunk_alignment(self, fps: float) -> float:
        """Two seconds at whole frame rates."""
        patch = self.config.vision_config.temporal_patch_size
        return chunk_alignment(fps, float(self.config.seconds_per_chunk), patch)

    def positions_per_chunk(
        self,
        *,
        frame: tuple[int, int] | None,
        sound: bool,
        fps: float,
        seconds: float,
        chunk_seconds: float,
        max_pixels: int | None = None,
    ) -> list[tuple[int, int]]:
        """Temporal patches times merged patches of a resized frame, and 25 a second of sound."""
        vision = self.config.vision_config
        per_patch = 0
        if frame is not None:
            factor = vision.patch_size * vision.spatial_merge_size
            limits = self.frame_limits(max_pixels)
            height, width = smart_resize(*frame, factor, limits["shortest_edge"], limits["longest_edge"])
            per_patch = (height // factor) * (width // factor)
        chunks = []
        for number in range(math.ceil(seconds / chunk_seconds)):
            length = min(chunk_seconds, seconds - number * chunk_seconds)
            patches = math.ceil(math.ceil(length * fps) / vision.temporal_patch_size)
            chunks.append((patches * per_patch, round(length * AUDIO_TOKENS_PER_SECOND) if sound else 0))
        return chunks

    def question_ids(self, question: str) -> Tensor:
        """ChatML: the question, end of the user's turn, start of the assistant's."""
        return self.tokenizer(question_turn(question), return_tensors="pt").input_ids

    def answer_ids(self, answer: str) -> Tensor:
        """The answer and ``<|im_end|>``."""
        return self.tokenizer(answer + ANSWER_END, return_tensors="pt").input_ids

    @property
    def end_token_ids(self) -> list[int]:
        """``<|im_end|>`` and the tokenizer's own end and padding tokens."""
        known = (self.tokenizer.convert_tokens_to_ids(ANSWER_END), self.tokenizer.eos_token_id)
        return sorted({*known, self.tokenizer.pad_token_id} - {None})

    def set_rope_deltas(self, deltas: Tensor) -> None:
        """State on the stock model, which a second video would inherit: set before every generation."""
        self.model.model.rope_deltas = deltas

    def lora_targets(self, names: Sequence[str]) -> str:
        """Projections of the decoder layers; the encoders have modules of the same names."""
        return rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(names)})"

"""VideoLLaMA 3 with the model class of transformers: video only, a Qwen2 decoder with 1-D RoPE."""

from __future__ import annotations

import math
from typing import ClassVar

from transformers import VideoLlama3ForConditionalGeneration, VideoLlama3Processor

from omnimem.backbones.layout import patches_per_timestamp
from omnimem.backbones.rope_1d import Rope1DBackbone
from omnimem.backbones.video_llama_3.stream_encoder import VideoLlama3StreamEncoder, frame_limits
from omnimem.backbones.video_llama_3.tiny import build_tiny
from omnimem.backbones.vision import PixelLimits


class VideoLlama3(Rope1DBackbone):
    """Encodes every frame and keeps only the tokens that changed since the previous one; see `Rope1DBackbone`."""

    name = "video_llama_3"
    model_types = ("video_llama_3",)
    model_class = VideoLlama3ForConditionalGeneration
    processor_class = VideoLlama3Processor
    encoder_class = VideoLlama3StreamEncoder
    projectors: ClassVar[dict[str, str]] = {"visual": "projector"}
    skip_quantization_modules: ClassVar[tuple[str, ...]] = ("model.vision_model", "model.projector", "lm_head")
    build_tiny = staticmethod(build_tiny)

    def frame_limits(self, frames: int | None, max_pixels: int | None = None) -> PixelLimits:
        """Limits of a resized frame in a clip of `frames` frames; see `frame_limits`."""
        return frame_limits(self.processor.video_processor, frames, max_pixels)

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
        """Upper bound: all tokens of all frames, as if every patch changed; see `Backbone.tokens_per_chunk`."""
        limits = self.frame_limits(math.ceil(seconds * fps), max_pixels)
        per_frame = 0 if frame_size is None else limits.tokens(*frame_size)
        starts = [number * chunk_seconds for number in range(math.ceil(seconds / chunk_seconds))]
        return [(math.ceil(min(chunk_seconds, seconds - start) * fps) * per_frame, 0) for start in starts]

    def text_tokens(self, fps: float, seconds: float, timestamps: int | None) -> int:
        """Tokens of the timestamps and of the commas before them."""
        frames = math.ceil(seconds * fps)
        groups = math.ceil(frames / patches_per_timestamp(frames, timestamps))
        return groups * (self.text_ids(f"Time {seconds:.1f}s:").shape[1] + 1)

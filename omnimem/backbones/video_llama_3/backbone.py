"""VideoLLaMA 3 on stock transformers classes: video without sound, a Qwen2 decoder with one rotary axis."""

from __future__ import annotations

import math
from typing import ClassVar

from transformers import VideoLlama3ForConditionalGeneration, VideoLlama3Processor

from omnimem.backbones.layout import patches_per_timestamp
from omnimem.backbones.rope_1d import Rope1DBackbone
from omnimem.backbones.video_llama_3.stream_encoder import VideoLlama3StreamEncoder
from omnimem.backbones.video_llama_3.tiny import build_tiny
from omnimem.backbones.vision import PixelLimits


class VideoLlama3(Rope1DBackbone):
    """Sees what changes from frame to frame, each after the time it is at; see `Rope1DBackbone` for the parameters."""

    name = "video_llama_3"
    model_types = ("video_llama_3",)
    model_class = VideoLlama3ForConditionalGeneration
    processor_class = VideoLlama3Processor
    encoder_class = VideoLlama3StreamEncoder
    projectors: ClassVar[dict[str, str]] = {"visual": "projector"}
    skip_quantization_modules: ClassVar[tuple[str, ...]] = ("model.vision_model", "model.projector", "lm_head")
    build_tiny = staticmethod(build_tiny)

    def frame_limits(self, frames: int | None, max_pixels: int | None = None) -> PixelLimits:
        """Limits of a resized frame of a clip of so many frames.

        As in the stock processor, all frames of a clip share one budget of pixels; but where a clip has more frames
        than the model was trained with, or nobody knows how many, each gets what it has in the longest trained clip.
        """
        processor = self.processor.video_processor
        shared = min(frames or processor.max_frames, processor.max_frames)
        most = min(processor.size["longest_edge"] // shared, max_pixels or processor.size["longest_edge"])
        return PixelLimits(
            min(processor.size["shortest_edge"], most), most, processor.patch_size * processor.merge_size
        )

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
        """At most: frames times positions of a resized one, as if everything changed all the time."""
        limits = self.frame_limits(math.ceil(seconds * fps), max_pixels)
        per_frame = 0 if frame_size is None else limits.tokens(*frame_size)
        starts = [number * chunk_seconds for number in range(math.ceil(seconds / chunk_seconds))]
        return [(math.ceil(min(chunk_seconds, seconds - start) * fps) * per_frame, 0) for start in starts]

    def text_tokens(self, fps: float, seconds: float, timestamps: int | None) -> int:
        """The times between the frames, and the comma behind a frame."""
        frames = math.ceil(seconds * fps)
        groups = math.ceil(frames / patches_per_timestamp(frames, timestamps))
        return groups * (self.text_ids(f"Time {seconds:.1f}s:").shape[1] + 1)

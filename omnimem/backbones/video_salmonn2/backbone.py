"""video-SALMONN 2+ as backbones: loading of published checkpoints, layouts, module names."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from omnimem.backbones.layout import common_multiple
from omnimem.backbones.qwen import QwenBackbone
from omnimem.backbones.qwen2_5_vl.stream_encoder import SpanEncoder
from omnimem.backbones.qwen3_vl.backbone import PROJECTORS
from omnimem.backbones.qwen3_vl.stream_encoder import TimestampEncoder
from omnimem.backbones.video_salmonn2.audio import SEGMENT_SECONDS
from omnimem.backbones.video_salmonn2.configuration import is_qwen2_5
from omnimem.backbones.video_salmonn2.modeling import (
    VideoSalmonn2ForConditionalGeneration,
    VideoSalmonn2Qwen2_5ForConditionalGeneration,
)
from omnimem.backbones.video_salmonn2.processing import TOKENS_PER_SECOND, VideoSalmonn2Processor, segments
from omnimem.backbones.video_salmonn2.tiny import build_tiny, build_tiny_qwen2_5
from omnimem.backbones.vision import PixelLimits
from omnimem.media import Chunk

MIN_PIXELS, MAX_PIXELS = 784, 176_400
"""Pixels of a resized frame, as in the published training scripts."""


class WhisperEar:
    """Sound of chunks that begin at whole segments of 30 s: every started one becomes 60 positions."""

    per_second = float(TOKENS_PER_SECOND)

    def __init__(self, backbone: HearingBackbone) -> None:
        self.backbone = backbone

    def __call__(self, chunk: Chunk) -> Tensor:
        """Embeddings ``[60 * S, C]`` of a chunk's sound."""
        assert chunk.audio is not None
        features = segments(self.backbone.processor.feature_extractor, chunk.audio)
        return self.backbone.model.model.get_audio_features(features.to(self.backbone.device)).flatten(0, 1)


class HearingBackbone(QwenBackbone):
    """What both families share."""

    processor_class = VideoSalmonn2Processor
    projectors: ClassVar[dict[str, str]] = {"visual": "visual.merger", "audio": "audio.connector"}
    skip_quantization_modules: ClassVar[tuple[str, ...]] = ("model.visual", "model.audio", "lm_head")

    @classmethod
    def claims(cls, config: dict[str, Any]) -> bool:
        """Published files call themselves by the name of the vision-language model they were made from."""
        types = ("video_salmonn2", "video_salmonn2_qwen2_5")
        made_of = config.get("model_type") in ("qwen2_5_vl", "qwen3_vl") and config.get("audio_config") is not None
        family = VideoSalmonn2Qwen2_5 if is_qwen2_5(config) else VideoSalmonn2
        return cls is family and (made_of or config.get("model_type") in types)

    def ear(self) -> WhisperEar:
        """Whisper and the Q-Former."""
        return WhisperEar(self)

    def pixel_limits(self, max_pixels: int | None = None) -> PixelLimits:
        """Limits of the published training scripts, never above what the video processor or the caller allows."""
        processor = self.processor.video_processor
        most = min(max_pixels or MAX_PIXELS, processor.size["longest_edge"])
        return PixelLimits(min(MIN_PIXELS, most), most, processor.patch_size * processor.merge_size)

    def chunk_alignment(self, fps: float, sound: bool = True) -> float:
        """Whole temporal patches and, with sound, the 30 s that the audio encoder reads at once."""
        patch = self.temporal_patch / fps
        return common_multiple(patch, SEGMENT_SECONDS) if sound else common_multiple(patch)

    def audio_positions(self, seconds: float) -> int:
        """60 for every started 30 s."""
        return -int(-seconds // SEGMENT_SECONDS) * SEGMENT_SECONDS * TOKENS_PER_SECOND


class VideoSalmonn2(HearingBackbone):
    """Qwen3-VL family: 4B, 8B."""

    name = "video_salmonn2"
    model_types = ("video_salmonn2",)
    projectors: ClassVar[dict[str, str]] = {**PROJECTORS, "audio": "audio.connector"}
    frame_anchored = True
    model_class = VideoSalmonn2ForConditionalGeneration
    encoder_class = TimestampEncoder
    build_tiny = staticmethod(build_tiny)


class VideoSalmonn2Qwen2_5(HearingBackbone):
    """Qwen2.5-VL family: 3B, 7B, 72B."""

    name = "video_salmonn2_qwen2_5"
    model_types = ("video_salmonn2_qwen2_5",)
    model_class = VideoSalmonn2Qwen2_5ForConditionalGeneration
    encoder_class = SpanEncoder
    system_prompt = "You are a helpful assistant."
    build_tiny = staticmethod(build_tiny_qwen2_5)

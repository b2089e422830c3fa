"""Backbones of both families of video-SALMONN 2+."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from omnimem.backbones.layout import common_multiple
from omnimem.backbones.qwen import TransformersBackbone
from omnimem.backbones.qwen2_5_vl.stream_encoder import Qwen2_5VLStreamEncoder
from omnimem.backbones.qwen3_vl.backbone import PROJECTORS
from omnimem.backbones.qwen3_vl.stream_encoder import Qwen3VLStreamEncoder
from omnimem.backbones.video_salmonn2.audio import SEGMENT_SECONDS
from omnimem.backbones.video_salmonn2.configuration import is_qwen2_5
from omnimem.backbones.video_salmonn2.modeling import (
    VideoSalmonn2ForConditionalGeneration,
    VideoSalmonn2Qwen2_5ForConditionalGeneration,
)
from omnimem.backbones.video_salmonn2.processing import TOKENS_PER_SECOND, VideoSalmonn2Processor, log_mel_segments
from omnimem.backbones.video_salmonn2.tiny import build_tiny, build_tiny_qwen2_5
from omnimem.backbones.vision import PixelLimits
from omnimem.media import Chunk

MIN_PIXELS, MAX_PIXELS = 784, 176_400
"""Pixels per resized frame in the published training scripts."""


class WhisperQFormerEncoder:
    """Audio of chunks that start at multiples of 30 s: 60 tokens per segment of 30 s; the last may be partial."""

    tokens_per_second = float(TOKENS_PER_SECOND)

    def __init__(self, backbone: VideoSalmonn2Backbone) -> None:
        self.backbone = backbone

    def __call__(self, chunk: Chunk) -> Tensor:
        """Embeddings ``[60 * S, C]`` of the S segments of a chunk."""
        assert chunk.audio is not None
        features = log_mel_segments(self.backbone.processor.feature_extractor, chunk.audio)
        return self.backbone.model.model.get_audio_features(features.to(self.backbone.device)).flatten(0, 1)


class VideoSalmonn2Backbone(TransformersBackbone):
    """Shared by both families."""

    processor_class = VideoSalmonn2Processor
    projectors: ClassVar[dict[str, str]] = {"visual": "visual.merger", "audio": "audio.connector"}
    skip_quantization_modules: ClassVar[tuple[str, ...]] = ("model.visual", "model.audio", "lm_head")

    @classmethod
    def matches_config(cls, config: dict[str, Any]) -> bool:
        """See `Backbone.matches_config`; published files have the model type of the base model and an audio section."""
        types = ("video_salmonn2", "video_salmonn2_qwen2_5")
        published = config.get("model_type") in ("qwen2_5_vl", "qwen3_vl") and config.get("audio_config") is not None
        family = VideoSalmonn2Qwen2_5 if is_qwen2_5(config) else VideoSalmonn2
        return cls is family and (published or config.get("model_type") in types)

    def audio_encoder(self) -> WhisperQFormerEncoder:
        """Whisper encoder and Q-Former."""
        return WhisperQFormerEncoder(self)

    def pixel_limits(self, max_pixels: int | None = None) -> PixelLimits:
        """Limits of the published training scripts, lowered to those of the video processor and to `max_pixels`."""
        processor = self.processor.video_processor
        most = min(max_pixels or MAX_PIXELS, processor.size["longest_edge"])
        return PixelLimits(min(MIN_PIXELS, most), most, processor.patch_size * processor.merge_size)

    def chunk_alignment(self, fps: float, audio: bool = True) -> float:
        """Whole temporal patches and, with audio, whole segments of 30 s."""
        patch = self.temporal_patch / fps
        return common_multiple(patch, SEGMENT_SECONDS) if audio else common_multiple(patch)

    def audio_tokens(self, seconds: float) -> int:
        """60 per segment of 30 s; a partial last segment counts as a whole one."""
        return -int(-seconds // SEGMENT_SECONDS) * SEGMENT_SECONDS * TOKENS_PER_SECOND


class VideoSalmonn2(VideoSalmonn2Backbone):
    """Qwen3-VL family: 4B, 8B."""

    name = "video_salmonn2"
    model_types = ("video_salmonn2",)
    projectors: ClassVar[dict[str, str]] = {**PROJECTORS, "audio": "audio.connector"}
    spatial_ids_advance = True
    model_class = VideoSalmonn2ForConditionalGeneration
    encoder_class = Qwen3VLStreamEncoder
    build_tiny = staticmethod(build_tiny)


class VideoSalmonn2Qwen2_5(VideoSalmonn2Backbone):
    """Qwen2.5-VL family: 3B, 7B, 72B."""

    name = "video_salmonn2_qwen2_5"
    model_types = ("video_salmonn2_qwen2_5",)
    model_class = VideoSalmonn2Qwen2_5ForConditionalGeneration
    encoder_class = Qwen2_5VLStreamEncoder
    system_prompt = "You are a helpful assistant."
    build_tiny = staticmethod(build_tiny_qwen2_5)

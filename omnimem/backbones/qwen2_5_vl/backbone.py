"""Qwen2.5-VL on stock transformers classes: video without sound."""

from __future__ import annotations

from typing import ClassVar

from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from omnimem.backbones.qwen import QwenBackbone
from omnimem.backbones.qwen2_5_vl.stream_encoder import Qwen2_5VLStreamEncoder
from omnimem.backbones.qwen2_5_vl.tiny import build_tiny


class Qwen2_5VL(QwenBackbone):
    """Sees a stream, answers in text; ids are those the published checkpoints were trained with.

    Text behind a video stands one past its largest id. transformers 5.23 puts it at the start plus the picture's longer
    side instead, among the ids of the video.
    """

    name = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    model_class = Qwen2_5_VLForConditionalGeneration
    processor_class = Qwen2_5_VLProcessor
    encoder_class = Qwen2_5VLStreamEncoder
    projectors: ClassVar[dict[str, str]] = {"visual": "visual.merger"}
    skip_quantization_modules: ClassVar[tuple[str, ...]] = ("model.visual", "lm_head")
    supports_audio = False
    system_prompt = "You are a helpful assistant."
    build_tiny = staticmethod(build_tiny)

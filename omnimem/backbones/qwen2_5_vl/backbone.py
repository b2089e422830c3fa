"""Qwen2.5-VL with the model class of transformers: video only."""

from __future__ import annotations

from typing import ClassVar

from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from omnimem.backbones.qwen import TransformersBackbone
from omnimem.backbones.qwen2_5_vl.stream_encoder import Qwen2_5VLStreamEncoder
from omnimem.backbones.qwen2_5_vl.tiny import build_tiny


class Qwen2_5VL(TransformersBackbone):
    """Video in, text out; position ids as in the training of the published checkpoints.

    Text continues after the largest position id of the video. transformers 5.23 instead continues at the start id plus
    the longer side of a frame, which overlaps with ids of the video.
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

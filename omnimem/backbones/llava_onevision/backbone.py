"""LLaVA-OneVision with the model class of transformers: video only, a decoder with 1-D RoPE."""

from __future__ import annotations

import math
from typing import ClassVar

from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from omnimem.backbones.llava import LlavaBackbone, LlavaStreamEncoder
from omnimem.backbones.llava_onevision.stream_encoder import LlavaOnevisionStreamEncoder
from omnimem.backbones.llava_onevision.tiny import build_tiny


class LlavaOnevision(LlavaBackbone):
    """196 tokens per frame: at 1 fps the 32,768 trained position ids last 167 s."""

    name = "llava_onevision"
    model_types = ("llava_onevision",)
    model_class = LlavaOnevisionForConditionalGeneration
    processor_class = LlavaOnevisionProcessor
    encoder_class: ClassVar[type[LlavaStreamEncoder]] = LlavaOnevisionStreamEncoder
    build_tiny = staticmethod(build_tiny)

    @property
    def frame_side(self) -> int:
        """Tokens per frame along each side: the patch grid of the vision tower, halved (27 to 14)."""
        vision = self.config.vision_config
        return math.ceil(vision.image_size // vision.patch_size / 2)

"""LLaVA-OneVision on stock transformers classes: video without sound, a decoder with one rotary axis."""

from __future__ import annotations

import math
from typing import ClassVar

from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from omnimem.backbones.llava import LlavaBackbone, LlavaStreamEncoder
from omnimem.backbones.llava_onevision.stream_encoder import LlavaOnevisionStreamEncoder
from omnimem.backbones.llava_onevision.tiny import build_tiny


class LlavaOnevision(LlavaBackbone):
    """Frames of 196 ids: at one a second the trained 32,768 last 167 s."""

    name = "llava_onevision"
    model_types = ("llava_onevision",)
    model_class = LlavaOnevisionForConditionalGeneration
    processor_class = LlavaOnevisionProcessor
    encoder_class: ClassVar[type[LlavaStreamEncoder]] = LlavaOnevisionStreamEncoder
    build_tiny = staticmethod(build_tiny)

    @property
    def frame_side(self) -> int:
        """Positions by side of a frame: the tower's grid halved (27 become 14)."""
        vision = self.config.vision_config
        return math.ceil(vision.image_size // vision.patch_size / 2)

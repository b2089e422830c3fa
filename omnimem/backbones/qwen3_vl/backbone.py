"""Qwen3-VL on stock transformers classes: video without sound."""

from __future__ import annotations

from typing import ClassVar

from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from omnimem.backbones.qwen import QwenBackbone
from omnimem.backbones.qwen3_vl.stream_encoder import Qwen3VLStreamEncoder
from omnimem.backbones.qwen3_vl.tiny import build_tiny

PROJECTORS = {
    "visual": "visual.merger",
    **{f"deepstack_{i}": f"visual.deepstack_merger_list.{i}" for i in range(3)},
}
"""Mergers of the vision tower's last layer, and of the three that deepstack takes."""


class Qwen3VL(QwenBackbone):
    """Sees a stream, answers in text; the time is written between the pictures.

    The first time stands right behind the user's opening, as the published model was trained. transformers 5.23 leaves
    the start and end token of the chat template's placeholder around all of it: one token more on either side.
    """

    name = "qwen3_vl"
    model_types = ("qwen3_vl",)
    model_class = Qwen3VLForConditionalGeneration
    processor_class = Qwen3VLProcessor
    encoder_class = Qwen3VLStreamEncoder
    projectors: ClassVar[dict[str, str]] = PROJECTORS
    skip_quantization_modules: ClassVar[tuple[str, ...]] = ("model.visual", "lm_head")
    supports_audio = False
    spatial_ids_advance = True
    build_tiny = staticmethod(build_tiny)

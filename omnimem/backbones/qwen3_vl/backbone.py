"""Qwen3-VL with the model class of transformers: video only."""

from __future__ import annotations

from typing import ClassVar

from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from omnimem.backbones.qwen import TransformersBackbone
from omnimem.backbones.qwen3_vl.stream_encoder import Qwen3VLStreamEncoder
from omnimem.backbones.qwen3_vl.tiny import build_tiny

PROJECTORS = {
    "visual": "visual.merger",
    **{f"deepstack_{i}": f"visual.deepstack_merger_list.{i}" for i in range(3)},
}
"""Mergers of the last layer of the vision tower and of the three DeepStack layers."""


class Qwen3VL(TransformersBackbone):
    """Video in, text out; timestamps are written between temporal patches.

    The first timestamp directly follows the start of the user turn, as in training. transformers 5.23 keeps the start
    and end token of the chat template's placeholder around the whole video: one extra token on either side.
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

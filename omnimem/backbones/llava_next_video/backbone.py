"""LLaVA-NeXT-Video on stock transformers classes: video without sound, a Llama, Mistral or Yi decoder."""

from __future__ import annotations

from transformers import LlavaNextVideoForConditionalGeneration, LlavaNextVideoProcessor

from omnimem.backbones.llava import LlavaBackbone
from omnimem.backbones.llava_next_video.tiny import build_tiny


class LlavaNextVideo(LlavaBackbone):
    """Frames of 144 ids: at one a second the 4,096 of the 7B last 28 s.

    The turns are Vicuna's (``USER: … ASSISTANT:``), Mistral's (7B-32K) or ChatML (34B), as the checkpoint's template
    says.
    """

    name = "llava_next_video"
    model_types = ("llava_next_video",)
    model_class = LlavaNextVideoForConditionalGeneration
    processor_class = LlavaNextVideoProcessor
    build_tiny = staticmethod(build_tiny)

    @property
    def frame_side(self) -> int:
        """Positions by side of a frame: the tower's grid pooled (24 become 12)."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size // self.config.spatial_pool_stride

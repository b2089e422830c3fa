"""LLaVA-NeXT-Video with the model class of transformers: video only, a Llama, Mistral or Yi decoder."""

from __future__ import annotations

from transformers import LlavaNextVideoForConditionalGeneration, LlavaNextVideoProcessor

from omnimem.backbones.llava import LlavaBackbone
from omnimem.backbones.llava_next_video.tiny import build_tiny


class LlavaNextVideo(LlavaBackbone):
    """144 tokens per frame: at 1 fps the 4,096 trained position ids of the 7B model last 28 s.

    The chat template of the checkpoint decides the prompt format: Vicuna (``USER: … ASSISTANT:``), Mistral (7B-32K) or
    ChatML (34B).
    """

    name = "llava_next_video"
    model_types = ("llava_next_video",)
    model_class = LlavaNextVideoForConditionalGeneration
    processor_class = LlavaNextVideoProcessor
    build_tiny = staticmethod(build_tiny)

    @property
    def frame_side(self) -> int:
        """Tokens per frame along each side: the patch grid of the vision tower, pooled (24 to 12)."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size // self.config.spatial_pool_stride

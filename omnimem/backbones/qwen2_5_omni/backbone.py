"""The thinker of Qwen2.5-Omni with the model class of transformers."""

from __future__ import annotations

from typing import ClassVar

from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from omnimem.backbones.layout import common_multiple
from omnimem.backbones.qwen import TransformersBackbone
from omnimem.backbones.qwen2_5_omni.prompt import SYSTEM_PROMPT
from omnimem.backbones.qwen2_5_omni.stream_encoder import AUDIO_TOKENS_PER_SECOND, Qwen2_5OmniStreamEncoder
from omnimem.backbones.qwen2_5_omni.tiny import build_tiny


class Qwen2_5Omni(TransformersBackbone):
    """Video and audio in, text out."""

    name = "qwen2_5_omni"
    model_types = ("qwen2_5_omni", "qwen2_5_omni_thinker")
    model_class = Qwen2_5OmniThinkerForConditionalGeneration
    processor_class = Qwen2_5OmniProcessor
    encoder_class = Qwen2_5OmniStreamEncoder
    projectors: ClassVar[dict[str, str]] = {"visual": "visual.merger", "audio": "audio_tower.proj"}
    skip_quantization_modules: ClassVar[tuple[str, ...]] = ("model.visual", "model.audio_tower", "lm_head")
    system_prompt = SYSTEM_PROMPT
    build_tiny = staticmethod(build_tiny)

    def chunk_alignment(self, fps: float, audio: bool = True) -> float:
        """Whole audio blocks (2 s) and whole temporal patches: 2 s at integer frame rates."""
        return common_multiple(float(self.config.seconds_per_chunk), self.temporal_patch / fps)

    def audio_tokens(self, seconds: float) -> int:
        """25 per second."""
        return round(seconds * AUDIO_TOKENS_PER_SECOND)

"""The thinker of Qwen3-Omni, a mixture of experts, with the model class of transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from omnimem.backbones.layout import common_multiple
from omnimem.backbones.qwen import TransformersBackbone
from omnimem.backbones.qwen3_omni.stream_encoder import (
    Qwen3OmniStreamEncoder,
    attention_window_frames,
    audio_tokens,
)
from omnimem.backbones.qwen3_omni.tiny import build_tiny
from omnimem.errors import OmniMemError


class Qwen3Omni(TransformersBackbone):
    """Video and audio in, text out."""

    name = "qwen3_omni"
    model_types = ("qwen3_omni_moe", "qwen3_omni_moe_thinker")
    model_class = Qwen3OmniMoeThinkerForConditionalGeneration
    processor_class = Qwen3OmniMoeProcessor
    encoder_class = Qwen3OmniStreamEncoder
    projectors: ClassVar[dict[str, str]] = {
        "visual": "visual.merger",
        "deepstack_0": "visual.merger_list.0",
        "deepstack_1": "visual.merger_list.1",
        "deepstack_2": "visual.merger_list.2",
        "audio_in": "audio_tower.proj1",
        "audio": "audio_tower.proj2",
    }
    # Experts and routers are bare parameters, which bitsandbytes does not quantize: 90 % of the weights stay as loaded.
    skip_quantization_modules: ClassVar[tuple[str, ...]] = ("model.visual", "model.audio_tower", "lm_head")
    build_tiny = staticmethod(build_tiny)

    def __init__(self, model: Any, processor: Any, model_id: str = "") -> None:
        super().__init__(model, processor, model_id)
        if model.dtype == torch.float64:
            # torch's grouped matrix multiplication, the default of transformers, does not support float64.
            model.set_experts_implementation("eager")

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype, device: torch.device | str, load_in_4bit: bool = False
    ) -> TransformersBackbone:
        """Load a checkpoint from a folder or the hub (see `load_pretrained`)."""
        try:
            return super().load(path, dtype, device, load_in_4bit)
        except OmniMemError as error:
            # transformers stacks the experts of a layer while loading; its error does not name the missing expert.
            if problem := _incomplete_experts(Path(path)):
                raise OmniMemError(f"cannot load {path}: {problem}") from error
            raise

    def chunk_alignment(self, fps: float, audio: bool = True) -> float:
        """Whole temporal patches and, with audio, whole attention windows of the audio tower (8 s)."""
        patch = self.temporal_patch / fps
        extractor = self.processor.feature_extractor
        window = attention_window_frames(self.config.audio_config) * extractor.hop_length / extractor.sampling_rate
        return common_multiple(window, patch) if audio else common_multiple(patch)

    def audio_tokens(self, seconds: float) -> int:
        """13 per second, and the tokens of the last, shorter block."""
        extractor = self.processor.feature_extractor
        frames = int(round(seconds * extractor.sampling_rate, 3)) // extractor.hop_length
        return audio_tokens(frames, 2 * self.config.audio_config.n_window)

    def lora_target_regex(self, names: Sequence[str]) -> str:
        """Projections of the attention layers; the experts are not linear layers."""
        return rf".*language_model\.layers\.\d+\.self_attn\.({'|'.join(names)})"


EXPERT = re.compile(r"((?:thinker\.)?model\.(?:language_model\.)?layers\.\d+\.mlp\.experts)\.\d+\.\w+_proj\.weight")
"""Key of a weight of one expert in the published checkpoint."""


def _incomplete_experts(folder: Path) -> str:
    """Names the missing and unexpected weights of experts in a folder; empty if there are none."""
    found: set[str] = set()
    try:
        config = Qwen3OmniMoeThinkerConfig.from_pretrained(folder)
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as weights:
                found.update(filter(EXPERT.fullmatch, weights.keys()))
    except (OSError, ValueError, SafetensorError):
        return ""
    expected = {
        f"{match[1]}.{i}.{kind}_proj.weight"
        for key in found
        if (match := EXPERT.fullmatch(key))
        for i in range(config.get_text_config().num_experts)
        for kind in ("gate", "up", "down")
    }
    problems = (("missing", expected - found), ("unexpected", found - expected))
    return "; ".join(f"{len(keys)} {name} keys: {', '.join(sorted(keys)[:3])}" for name, keys in problems if keys)

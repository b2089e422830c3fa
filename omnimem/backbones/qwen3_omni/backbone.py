"""Qwen3-Omni's thinker on stock transformers classes: a mixture of experts that sees and hears."""

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
from omnimem.backbones.qwen import QwenBackbone
from omnimem.backbones.qwen3_omni.stream_encoder import Qwen3OmniStreamEncoder, audio_tokens
from omnimem.backbones.qwen3_omni.tiny import build_tiny
from omnimem.errors import OmniMemError


class Qwen3Omni(QwenBackbone):
    """The thinker: sees and hears a stream, answers in text."""

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
    # Experts and their routers are bare parameters, which NF4 passes over: nine tenths of this model stay as they are.
    skip_quantization_modules: ClassVar[tuple[str, ...]] = ("model.visual", "model.audio_tower", "lm_head")
    build_tiny = staticmethod(build_tiny)

    def __init__(self, model: Any, processor: Any, model_id: str = "") -> None:
        super().__init__(model, processor, model_id)
        if model.dtype == torch.float64:
            # PyTorch's grouped product of matrices, which transformers chooses, does not take double precision.
            model.set_experts_implementation("eager")

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype, device: torch.device | str, load_in_4bit: bool = False
    ) -> QwenBackbone:
        """Load a checkpoint folder or hub id; every weight must be there (see `load_pretrained`)."""
        try:
            return super().load(path, dtype, device, load_in_4bit)
        except OmniMemError as error:
            # transformers joins the experts of a layer while loading and does not say which one it could not.
            if problem := _incomplete_experts(Path(path)):
                raise OmniMemError(f"cannot load {path}: {problem}") from error
            raise

    @property
    def mel_window_frames(self) -> int:
        """Mel frames of a window of the audio tower's attention, beyond which it never looks (800 as published)."""
        audio = self.config.audio_config
        return audio.n_window_infer // (2 * audio.n_window) * 2 * audio.n_window

    def chunk_alignment(self, fps: float, audio: bool = True) -> float:
        """Whole temporal patches and, with sound, whole windows of the audio tower: 8 s as published."""
        patch = self.temporal_patch / fps
        extractor = self.processor.feature_extractor
        window = self.mel_window_frames * extractor.hop_length / extractor.sampling_rate
        return common_multiple(window, patch) if audio else common_multiple(patch)

    def audio_tokens(self, seconds: float) -> int:
        """13 a second, and what the audio tower makes of the rest."""
        extractor = self.processor.feature_extractor
        frames = int(round(seconds * extractor.sampling_rate, 3)) // extractor.hop_length
        return audio_tokens(frames, 2 * self.config.audio_config.n_window)

    def lora_target_regex(self, names: Sequence[str]) -> str:
        """Projections of the decoder's attention: what follows it are experts, which are no linear layers."""
        return rf".*language_model\.layers\.\d+\.self_attn\.({'|'.join(names)})"


EXPERT = re.compile(r"((?:thinker\.)?model\.(?:language_model\.)?layers\.\d+\.mlp\.experts)\.\d+\.\w+_proj\.weight")
"""Key of one expert's weight in the published checkpoint."""


def _incomplete_experts(folder: Path) -> str:
    """Which weights of single experts a folder lacks or has too many of; nothing where that is not what ails it."""
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

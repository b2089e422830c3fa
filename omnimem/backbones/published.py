"""Built-in configurations of published models, to plan memory when their files are not available.

Shapes only: the tokenizer is that of the tiny model, which needs somewhat more tokens for questions and answers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from omnimem.backbones.checkpoint import load_processor, quiet_transformers

QWEN2_5_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


def _text(
    layers: int, hidden: int, inner: int, heads: int, groups: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        **more,
    }


def _omni(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "text_config": {**text, "max_position_embeddings": 32_768},
        "vision_config": {**QWEN2_5_VISION, "out_hidden_size": text["hidden_size"]},
        "audio_config": {"output_dim": text["hidden_size"]},
    }


def _qwen2_5(text: dict[str, Any], tied: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "text_config": {**text, "max_position_embeddings": 128_000},
        "vision_config": {**QWEN2_5_VISION, "out_hidden_size": text["hidden_size"], "tokens_per_second": 2},
        "tie_word_embeddings": tied,
        **more,
    }


def _qwen3(
    layers: int, hidden: int, inner: int, vision: dict[str, Any], tied: bool = False, **more: Any
) -> dict[str, Any]:
    return {
        "text_config": _text(layers, hidden, inner, 32, 8, 151_936, head_dim=128, max_position_embeddings=262_144),
        "vision_config": {**vision, "out_hidden_size": hidden, "num_position_embeddings": 2304},
        "tie_word_embeddings": tied,
        **more,
    }


QWEN3_VISION_8B = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "deepstack_visual_indexes": [8, 16, 24],
}
QWEN3_VISION_4B = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "deepstack_visual_indexes": [5, 11, 17],
}
TEXT_7B = _text(28, 3584, 18944, 28, 4, 152_064)
TEXT_3B = _text(36, 2048, 11008, 16, 2, 151_936)
QWEN3_OMNI = {
    "position_id_per_seconds": 13,
    "text_config": _text(
        *(48, 2048, 768, 32, 4, 152_064),
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        max_position_embeddings=65_536,
        rope_parameters={
            "rope_type": "default",
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
            "rope_theta": 1e6,
        },
    ),
    "vision_config": {"out_hidden_size": 2048},
    "audio_config": {"output_dim": 2048},
}
VIDEO_LLAMA_3_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen/Qwen2.5-Omni-3B": ("qwen2_5_omni", _omni(TEXT_3B)),
    "Qwen/Qwen2.5-Omni-7B": ("qwen2_5_omni", _omni(TEXT_7B)),
    "Qwen/Qwen3-Omni-30B-A3B-Instruct": ("qwen3_omni", QWEN3_OMNI),
    "tsinghua-ee/video-SALMONN2_plus_3B_full": ("video_salmonn2_qwen2_5", _qwen2_5(TEXT_3B, tied=True)),
    "tsinghua-ee/video-SALMONN2_plus_7B_full": ("video_salmonn2_qwen2_5", _qwen2_5(TEXT_7B)),
    "video-SALMONN2_plus_4B": ("video_salmonn2", _qwen3(36, 2560, 9728, QWEN3_VISION_4B, tied=True)),
    "video-SALMONN2_plus_8B": ("video_salmonn2", _qwen3(36, 4096, 12288, QWEN3_VISION_8B)),
    "Qwen/Qwen3-VL-4B-Instruct": ("qwen3_vl", _qwen3(36, 2560, 9728, QWEN3_VISION_4B, tied=True)),
    "Qwen/Qwen3-VL-8B-Instruct": ("qwen3_vl", _qwen3(36, 4096, 12288, QWEN3_VISION_8B)),
    "Qwen/Qwen2.5-VL-7B-Instruct": ("qwen2_5_vl", _qwen2_5(TEXT_7B)),
    "llava-hf/LLaVA-NeXT-Video-7B-hf": (
        "llava_next_video",
        {"text_config": _text(32, 4096, 11008, 32, 32, 32_064, model_type="llama", max_position_embeddings=4096)},
    ),
    "lkhl/VideoLLaMA3-7B-Image-HF": (
        "video_llama_3",
        {
            "text_config": {**TEXT_7B, "model_type": "qwen2", "max_position_embeddings": 32_768},
            "vision_config": VIDEO_LLAMA_3_VISION,
        },
    ),
}
"""Model name (hub id, if any) → (backbone, arguments of its configuration class that differ from the defaults)."""

VIDEO_PROCESSORS = {"video_llama_3": {"size": {"shortest_edge": 16 * 28**2, "longest_edge": 16_384 * 28**2}}}
"""Backbone → arguments of its video processor class that differ from the defaults."""


def build_on_meta(path: str, cls: Any, dtype: torch.dtype) -> Any:
    """Backbone of class `cls` for a published model, on the ``meta`` device, with the tokenizer of the tiny model."""
    name, parameters = PUBLISHED[path]
    with tempfile.TemporaryDirectory() as folder:
        processor = load_processor(cls.processor_class, cls.build_tiny(Path(folder) / "tiny"))
    processor.video_processor = type(processor.video_processor)(**VIDEO_PROCESSORS.get(name, {}))
    with quiet_transformers(), torch.device("meta"):
        model = cls.model_class(cls.model_class.config_class(**parameters)).to(dtype).eval()
    return cls(model, processor, path)

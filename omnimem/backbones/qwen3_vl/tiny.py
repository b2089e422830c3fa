"""A tiny random Qwen3-VL in the format of the published checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from omnimem.backbones.qwen2_5_vl.tiny import CHAT_TEMPLATE, token_ids
from omnimem.backbones.tiny import VISION_TOKENS, tiny_tokenizer, write_tiny


def tiny_parameters(tokenizer: PreTrainedTokenizerFast, layers: int, hidden: int) -> dict[str, Any]:
    """Configuration of the tiny model: 4 heads, 2 key-value heads, three DeepStack layers."""
    return {
        "text_config": {
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": hidden // 4,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [hidden // 8 - 2 * (hidden // 32), hidden // 32, hidden // 32],
                "mrope_interleaved": True,
                "rope_theta": 5e6,
            },
            # Published: 0.02 at width 4096. Width 64 needs 1/sqrt(64) for activations of similar size.
            "initializer_range": hidden**-0.5,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        "vision_config": {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
            "initializer_range": 32**-0.5,
        },
        **token_ids(tokenizer),
        "tie_word_embeddings": False,
    }


def tiny_vision() -> dict[str, Any]:
    """Image and video processor; at most 16 tokens per frame, to keep CPU tests short."""
    size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 16 * 32 * 32}
    return {
        "image_processor": Qwen2VLImageProcessor(size=size, patch_size=16),
        "video_processor": Qwen3VLVideoProcessor(size=size),
    }


def build_tiny(path: str | Path, seed: int = 0, layers: int = 4, hidden: int = 64) -> Path:
    """Write a tiny random checkpoint to `path`, replacing an existing folder; returns `path`."""
    tokenizer = tiny_tokenizer(VISION_TOKENS)
    processor = Qwen3VLProcessor(**tiny_vision(), tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)
    config = Qwen3VLConfig(**tiny_parameters(tokenizer, layers, hidden))
    return write_tiny(path, seed, lambda: Qwen3VLForConditionalGeneration(config), processor)

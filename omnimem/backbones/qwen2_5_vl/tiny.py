"""A tiny random Qwen2.5-VL in the published format (keys ``visual.*`` and ``model.*``, flat configuration)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from omnimem.backbones.tiny import VISION_TOKENS, chat_template, mrope_section, tiny_tokenizer, write_tiny

CHAT_TEMPLATE = chat_template(
    video="<|vision_start|><|video_pad|><|vision_end|>",
    audio="",
    image="<|vision_start|><|image_pad|><|vision_end|>",
)


def tiny_parameters(tokenizer: PreTrainedTokenizerFast, layers: int, hidden: int) -> dict[str, Any]:
    """Configuration of the tiny model: 4 heads, 2 key-value heads, a vision tower of width 32."""
    return {
        "text_config": {
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": mrope_section(hidden // 4),
                "rope_theta": 1e6,
            },
            # Published: 0.02 at width 3584. Width 64 needs 1/sqrt(64) for activations of similar size.
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
            "fullatt_block_indexes": [1, 3],
            "window_size": 112,
            "tokens_per_second": 2,
            "initializer_range": 32**-0.5,
        },
        **token_ids(tokenizer),
        "tie_word_embeddings": False,
    }


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Special token ids in the configurations of vision-language models."""
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    return {f"{name}_id": int(tokenizer.convert_tokens_to_ids(VISION_TOKENS[name])) for name in names}  # pyright: ignore


def build_tiny(path: str | Path, seed: int = 0, layers: int = 3, hidden: int = 64) -> Path:
    """Write a tiny random checkpoint to `path`, replacing an existing folder; returns `path`."""
    tokenizer = tiny_tokenizer(VISION_TOKENS)
    # At most 16 tokens per frame, to keep CPU tests short.
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size=size),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    config = Qwen2_5_VLConfig(**tiny_parameters(tokenizer, layers, hidden))
    return write_tiny(path, seed, lambda: Qwen2_5_VLForConditionalGeneration(config), processor, hub_name=hub_name)


def hub_name(name: str) -> str:
    """Key of a weight in the published checkpoint, from its name in the transformers model."""
    return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)

"""A tiny random LLaVA-OneVision with the key names of the published checkpoints (``language_model.*``…)."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)

from omnimem.backbones.llava import hub_name
from omnimem.backbones.tiny import tiny_tokenizer, write_tiny

SPECIAL_TOKENS = {
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "im_start_token": "<|im_start|>",
    "image_token": "<image>",
    "video_token": "<video>",
}
"""Special tokens as in the published tokenizer."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role + ' ' }}"
    "{% if message.content is string %}{{ '\n' + message.content }}{% else %}"
    "{% for part in message.content if part.type == 'image' %}<image>{% endfor %}"
    "{% for part in message.content if part.type == 'video' %}<video>{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ '\n' + part.text }}{% endfor %}{% endif %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Produces the same prompts as the published template: media first, a line feed before text, none between turns."""

SIDE, PATCH = 70, 14
"""Frame size and patch size in pixels: 5×5 patches become 3×3, rounded up like 27 to 14 in the published model."""


def build_tiny(path: str | Path, seed: int = 0, layers: int = 3, hidden: int = 64) -> Path:
    """Write a tiny random checkpoint to `path`, replacing an existing folder; returns `path`."""
    tokenizer = tiny_tokenizer(SPECIAL_TOKENS)
    size = {"height": SIDE, "width": SIDE}
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[SIDE, SIDE]], **normal),
        video_processor=LlavaOnevisionVideoProcessor(size=size, **normal),
        tokenizer=tokenizer,
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    config = LlavaOnevisionConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            # Published: 0.02 at width 3584. Width 64 needs 1/sqrt(64) for activations of similar size.
            "initializer_range": hidden**-0.5,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=[[SIDE, SIDE]],
        tie_word_embeddings=False,
    )
    return write_tiny(path, seed, lambda: LlavaOnevisionForConditionalGeneration(config), processor, hub_name=hub_name)

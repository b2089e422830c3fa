"""A tiny offline VideoLLaMA 3, saved in the hub's layout."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
    VideoLlama3ImageProcessor,
    VideoLlama3Processor,
    VideoLlama3VideoProcessor,
)

from omnimem.backbones.tiny import chat_template, tiny_tokenizer, write_tiny

SPECIAL_TOKENS = {
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "im_start_token": "<|im_start|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
"""Names and spellings as in the published tokenizer."""

CHAT_TEMPLATE = chat_template("<|video_pad|>\n", "", "<|image_pad|>\n")
"""Writes what the published one writes: ChatML without a system turn, a line feed behind pictures."""

PATCH, MAX_FRAMES = 14, 16
SIZE = {"shortest_edge": 4 * 28 * 28, "longest_edge": MAX_FRAMES * 9 * 28 * 28}
"""From 4 positions a frame to 9 in the longest trained clip (published: from 16 to 91 in 180 frames)."""


def build_tiny(path: str | Path, seed: int = 0, layers: int = 3, hidden: int = 64) -> Path:
    """Write a tiny random checkpoint in the hub's layout; returns the folder (an existing one is replaced)."""
    tokenizer = tiny_tokenizer(SPECIAL_TOKENS, "Time 0.0s:,Time 12.5s:")
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = VideoLlama3Processor(
        image_processor=VideoLlama3ImageProcessor(size=SIZE, patch_size=PATCH, merge_size=1, **normal),
        video_processor=VideoLlama3VideoProcessor(size=SIZE, max_frames=MAX_FRAMES, **normal),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    config = VideoLlama3Config(
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
            # The published 0.02 fits width 3584; at width 64 the same signal needs 1/sqrt(64).
            "initializer_range": hidden**-0.5,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "initializer_range": 32**-0.5,
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        tie_word_embeddings=False,
    )
    return write_tiny(path, seed, lambda: VideoLlama3ForConditionalGeneration(config), processor)

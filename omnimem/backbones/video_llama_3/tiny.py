"""A tiny random VideoLLaMA 3 in the format of the published checkpoints."""

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
"""Special tokens as in the published tokenizer."""

CHAT_TEMPLATE = chat_template("<|video_pad|>\n", "", "<|image_pad|>\n")
"""Produces the same prompts as the published template: ChatML without a system turn, a line feed after media."""

PATCH, MAX_FRAMES = 14, 16
SIZE = {"shortest_edge": 4 * 28 * 28, "longest_edge": MAX_FRAMES * 9 * 28 * 28}
"""Pixel limits: 4 to 9 tokens per frame in the longest trained clip (published: 16 to 91 in 180 frames)."""


def build_tiny(path: str | Path, seed: int = 0, layers: int = 3, hidden: int = 64) -> Path:
    """Write a tiny random checkpoint to `path`, replacing an existing folder; returns `path`."""
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
            # Published: 0.02 at width 3584. Width 64 needs 1/sqrt(64) for activations of similar size.
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

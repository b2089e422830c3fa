"""A tiny random LLaVA-NeXT-Video with the key names of the published checkpoints (``language_model.*``…)."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LlamaTokenizer,
    LlavaNextImageProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
)

from omnimem.backbones.llava import hub_name
from omnimem.backbones.tiny import CORPUS, write_tiny

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content[0].text }}{% else %}"
    "{{ message.role.upper() + ': ' }}{% endif %}"
    "{% for part in message.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message.content if part.type == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Produces the same prompts as the template of the published 7B: Vicuna format, media before text."""

SIDE, PATCH = 84, 14
"""Frame size and patch size in pixels: 6×6 patches, pooled to 3×3."""


def build_tiny(path: str | Path, seed: int = 0, layers: int = 3, hidden: int = 64) -> Path:
    """Write a tiny random checkpoint to `path`, replacing an existing folder; returns `path`."""
    tokenizer = llama_tokenizer()
    size, crop = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    processor = LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(size=size, crop_size=crop),
        image_processor=LlavaNextImageProcessor(size=size, crop_size=crop, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = LlavaNextVideoConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            # Published: 0.02 at width 4096. Width 64 needs 1/sqrt(64) for activations of similar size.
            "initializer_range": hidden**-0.5,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "projection_dim": 32,
        },
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=pinpoints,
    )
    return write_tiny(path, seed, lambda: LlavaNextVideoForConditionalGeneration(config), processor, hub_name=hub_name)


def llama_tokenizer() -> LlamaTokenizer:
    """Byte-pair tokenizer of about 500 entries like that of Llama 2: ``▁`` for spaces, byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    # A word starts with its space; merges do not cross words.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special_tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(["USER: ASSISTANT:", *CORPUS], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    return LlamaTokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        pad_token="<pad>",
        add_bos_token=True,
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )

"""A tiny offline LLaVA-NeXT-Video, saved in the hub's layout (``language_model.*``, ``vision_tower.*``…)."""

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
"""Writes what the published one of the 7B writes: Vicuna's turns, pictures before text."""

SIDE, PATCH = 84, 14
"""Six patches by side, pooled to three."""


def build_tiny(path: str | Path, seed: int = 0, layers: int = 3, hidden: int = 64) -> Path:
    """Write a tiny random checkpoint in the hub's layout; returns the folder (an existing one is replaced)."""
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
            # The published 0.02 fits width 4096; at width 64 the same signal needs 1/sqrt(64).
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
    """Byte-pair tokenizer of about 500 entries, as Llama 2 has one: ``▁`` is a space, bytes spell what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    # Words begin with their space, and no merge goes over one.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(["USER: ASSISTANT:", *CORPUS], trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    return LlamaTokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        pad_token="<pad>",
        add_bos_token=True,
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )

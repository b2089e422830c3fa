"""A tiny random Qwen2.5-Omni: transformers' classes with a small configuration and its own tokenizer.

It is saved in the format of the published checkpoint (``thinker.*`` keys, configuration of the full model) and loaded
by the same code as Qwen2.5-Omni-7B::

    python -c "from omnimem.backbones.qwen2_5_omni.tiny import build_tiny; build_tiny('tiny')"
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniConfig,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from omnimem.backbones.checkpoint import quiet_transformers
from omnimem.backbones.qwen2_5_omni.prompt import SYSTEM_PROMPT
from omnimem.backbones.tiny import chat_template, mrope_section, tiny_tokenizer, write_tiny

HUB_PREFIX = "thinker."

SPECIAL_TOKENS = {
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "im_start_token": "<|im_start|>",
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
"""Special tokens as in the published tokenizer."""

CHAT_TEMPLATE = chat_template(
    video="<|vision_bos|><|VIDEO|><|vision_eos|>",
    audio="<|audio_bos|><|AUDIO|><|audio_eos|>",
    image="<|vision_bos|><|IMAGE|><|vision_eos|>",
)


def tiny_processor(tokenizer: PreTrainedTokenizerFast | None = None) -> Qwen2_5OmniProcessor:
    """Processor with the published image, video and audio settings and the tiny tokenizer."""
    # At most 16 tokens per frame (112x112 pixels) instead of 128 to 768, to keep CPU tests short.
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28}
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size=size),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, chunk_length=300, return_attention_mask=True),
        tokenizer=tokenizer or tiny_tokenizer(SPECIAL_TOKENS, SYSTEM_PROMPT),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast, layers: int = 3, hidden: int = 64) -> Qwen2_5OmniThinkerConfig:
    """Configuration of the tiny thinker: 3 layers of width 64, 4 heads, 2 key-value heads, two small encoders."""
    token: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(text) for name, text in SPECIAL_TOKENS.items()}
    head_dim = hidden // 4
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "mrope_section": mrope_section(head_dim), "rope_theta": 1e6},
            "tie_word_embeddings": False,
            # Published: 0.02 at width 3584. Width 64 needs 1/sqrt(64) for activations of similar size.
            "initializer_range": hidden**-0.5,
            "pad_token_id": token["pad_token"],
            "eos_token_id": token["eos_token"],
        },
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [1, 3],
            "window_size": 112,
            "initializer_range": 32**-0.5,
        },
        audio_config={
            "num_mel_bins": 128,
            "encoder_layers": 2,
            "d_model": 32,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "output_dim": hidden,
            "initializer_range": 32**-0.5,
            "n_window": 100,
        },
        image_token_index=token["image_token"],
        audio_token_index=token["audio_token"],
        video_token_index=token["video_token"],
        audio_start_token_id=token["audio_bos_token"],
        audio_end_token_id=token["audio_eos_token"],
        tie_word_embeddings=False,
        initializer_range=hidden**-0.5,
    )
    # Not declared by the configuration class, but in the published files; get_rope_index reads the second.
    config.pad_token_id = token["pad_token"]
    config.vision_start_token_id = token["vision_bos_token"]
    config.vision_end_token_id = token["vision_eos_token"]
    return config


def build_tiny(path: str | Path, seed: int = 0, layers: int = 3, hidden: int = 64) -> Path:
    """Write a tiny random checkpoint in the format of the published one.

    Parameters
    ----------
    path : str or Path
        Folder to write; an existing one is replaced.
    seed : int
        Seed of the weights.
    layers, hidden : int
        Size of the language model.

    Returns
    -------
    Path
        The folder.
    """
    tokenizer = tiny_tokenizer(SPECIAL_TOKENS, SYSTEM_PROMPT)
    # The default configuration of the talker (not saved here) logs warnings about its token ids.
    with quiet_transformers():
        thinker = tiny_config(tokenizer, layers, hidden)
        full_config = Qwen2_5OmniConfig(thinker_config=thinker.to_dict(), enable_audio_output=False)
    full_config.architectures = ["Qwen2_5OmniForConditionalGeneration"]
    return write_tiny(
        path,
        seed,
        lambda: Qwen2_5OmniThinkerForConditionalGeneration(thinker),
        tiny_processor(tokenizer),
        full_config,
        hub_name,
    )


def hub_name(name: str) -> str:
    """Key of a weight in the published checkpoint, from its name in the transformers model."""
    name = name.replace("model.language_model.", "model.", 1)
    for tower in ("visual", "audio_tower"):
        name = name.replace(f"model.{tower}.", f"{tower}.", 1)
    return HUB_PREFIX + name

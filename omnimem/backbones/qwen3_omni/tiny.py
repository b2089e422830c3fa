"""A tiny offline Qwen3-Omni: the real classes with a small configuration, random weights, its own tokenizer.

It is saved in the hub's layout (``thinker.*`` keys under a whole-model configuration, every expert by itself) and
loaded by the same code as the real checkpoint. One thing is smaller than there for the sake of short clips: the audio
tower looks 2 s far instead of 8, so chunks may be 2 s long::

    python -c "from omnimem.backbones.qwen3_omni.tiny import build_tiny; build_tiny('tiny')"
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from omnimem.backbones.checkpoint import quiet_transformers
from omnimem.backbones.qwen2_5_omni.tiny import hub_name
from omnimem.backbones.tiny import chat_template, tiny_tokenizer, write_tiny

SPECIAL_TOKENS = {
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "im_start_token": "<|im_start|>",
    "image_token": "<|image_pad|>",
    "audio_token": "<|audio_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
"""Names and spellings as in the published tokenizer."""

CHAT_TEMPLATE = chat_template(
    video="<|vision_start|><|video_pad|><|vision_end|>",
    audio="<|audio_start|><|audio_pad|><|audio_end|>",
    image="<|vision_start|><|image_pad|><|vision_end|>",
)


def tiny_processor(tokenizer: PreTrainedTokenizerFast | None = None) -> Qwen3OmniMoeProcessor:
    """The stock processor with published image, video and sound settings around the tiny tokenizer."""
    # At most 16 tokens a frame (128x128 pixels) instead of 128 to 768, so that CPU streams stay short.
    size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 16 * 32 * 32}
    return Qwen3OmniMoeProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=16),
        video_processor=Qwen2VLVideoProcessor(size=size, patch_size=16),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, return_attention_mask=True),
        tokenizer=tokenizer or tiny_tokenizer(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(
    tokenizer: PreTrainedTokenizerFast, layers: int = 4, hidden: int = 64, audio_window: int = 200
) -> Qwen3OmniMoeThinkerConfig:
    """Configuration of the tiny thinker: 4 experts of which 2 work, three deepstack maps, two small encoders."""
    token: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(text) for name, text in SPECIAL_TOKENS.items()}
    config = Qwen3OmniMoeThinkerConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": hidden,
            "moe_intermediate_size": hidden,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": hidden // 4,
            "max_position_embeddings": 65536,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [hidden // 8 - 2 * (hidden // 32), hidden // 32, hidden // 32],
                "mrope_interleaved": True,
                "rope_theta": 1e6,
            },
            # The published 0.02 fits width 2048; at width 64 the same signal needs 1/sqrt(64).
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
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
            "initializer_range": 32**-0.5,
        },
        audio_config={
            "num_mel_bins": 128,
            "encoder_layers": 2,
            "d_model": 32,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "downsample_hidden_size": 8,
            "output_dim": hidden,
            "n_window_infer": audio_window,
            "initializer_range": 32**-0.5,
        },
        image_token_id=token["image_token"],
        audio_token_id=token["audio_token"],
        video_token_id=token["video_token"],
        audio_start_token_id=token["audio_bos_token"],
        # The default of the class, 25, is not what its processor merges by.
        position_id_per_seconds=13,
        initializer_range=hidden**-0.5,
    )
    # Not declared by the configuration class, but get_rope_index reads the third, and the hub's files have all of them.
    config.pad_token_id = token["pad_token"]
    config.audio_end_token_id = token["audio_eos_token"]
    config.vision_start_token_id = token["vision_bos_token"]
    config.vision_end_token_id = token["vision_eos_token"]
    return config


def build_tiny(path: str | Path, seed: int = 0, layers: int = 4, hidden: int = 64, audio_window: int = 200) -> Path:
    """Write a tiny random checkpoint in the hub's layout.

    Parameters
    ----------
    path : str or Path
        Folder to write; an existing one is replaced.
    seed : int
        Seed of the weights.
    layers, hidden : int
        Size of the language model.
    audio_window : int
        Mel frames of an attention window of the audio tower; 800 as published.

    Returns
    -------
    Path
        The folder.
    """
    tokenizer = tiny_tokenizer(SPECIAL_TOKENS)
    # The stock defaults of the talker (not saved here) name ids outside its own vocabulary and warn of it.
    with quiet_transformers():
        thinker = tiny_config(tokenizer, layers, hidden, audio_window)
        whole = Qwen3OmniMoeConfig(thinker_config=thinker.to_dict(), enable_audio_output=False)
    whole.architectures = ["Qwen3OmniMoeForConditionalGeneration"]
    return write_tiny(
        path,
        seed,
        lambda: Qwen3OmniMoeThinkerForConditionalGeneration(thinker),
        tiny_processor(tokenizer),
        whole,
        hub_name,
        hub_parts,
    )


def hub_parts(name: str, weight: Tensor) -> Mapping[str, Tensor]:
    """Weights of the single experts, where the stock class holds those of all in one ``[E, …]``."""
    if ".experts." not in name:
        return {name: weight}
    experts, kind = name.rsplit(".", 1)
    kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    return {
        f"{experts}.{i}.{kind}.weight": part
        for i, expert in enumerate(weight)
        for kind, part in zip(kinds, expert.chunk(len(kinds)), strict=True)
    }

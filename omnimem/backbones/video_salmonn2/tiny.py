"""Tiny random video-SALMONN 2+ models of both families, in the format of the published checkpoints.

As published: weight names, configuration files (flat in the Qwen2.5-VL family, nested in the Qwen3-VL family, BERT's
key names for the Q-Former), video processors, and no feature extractor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from omnimem.backbones.qwen2_5_vl import tiny as qwen2_5_vl
from omnimem.backbones.qwen3_vl import tiny as qwen3_vl
from omnimem.backbones.tiny import VISION_TOKENS, chat_template, tiny_tokenizer, write_tiny
from omnimem.backbones.video_salmonn2 import keys, modeling
from omnimem.backbones.video_salmonn2.configuration import VideoSalmonn2Config, VideoSalmonn2Qwen2_5Config

TOKENS = {**VISION_TOKENS, "audio_token": "<|audio_pad|>"}

CHAT_TEMPLATE = chat_template(
    video="<|vision_start|><|video_pad|><|vision_end|>",
    audio="<|vision_start|><|audio_pad|><|vision_end|>",
    image="<|vision_start|><|image_pad|><|vision_end|>",
)


def audio_parameters(hidden: int) -> dict[str, Any]:
    """Configuration of a small audio branch, with the key names of the published files."""
    return {
        "model_type": "whisper",
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "num_mel_bins": 128,
        "max_source_positions": 1500,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "second_per_window": 0.5,
        "second_stride": 0.5,
        "init_std": 32**-0.5,
        "qformer_config": {
            "model_type": "bert",
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "query_length": 1,
            "encoder_width": 32,
            "add_cross_attention": True,
            "cross_attention_freq": 1,
            "out_hidden_size": hidden,
            "initializer_range": 48**-0.5,
        },
    }


def build_tiny(path: str | Path, seed: int = 0, layers: int = 4, hidden: int = 64) -> Path:
    """Write a tiny random checkpoint of the Qwen3-VL family to `path`, replacing an existing folder; returns `path`."""
    tokenizer = _tokenizer()
    config = {
        "architectures": ["video_SALMONN2_plus"],
        "model_type": "qwen3_vl",
        **qwen3_vl.tiny_parameters(tokenizer, layers, hidden),
        "audio_config": audio_parameters(hidden),
        "audio_token_id": tokenizer.convert_tokens_to_ids(TOKENS["audio_token"]),
    }
    parsed = VideoSalmonn2Config(**config)
    processors = (*qwen3_vl.tiny_vision().values(), tokenizer)
    return write_tiny(
        path,
        seed,
        lambda: modeling.VideoSalmonn2ForConditionalGeneration(parsed),
        processors,
        config,
        lambda name: keys.published(name, "model.audio."),
    )


def build_tiny_qwen2_5(path: str | Path, seed: int = 0, layers: int = 4, hidden: int = 64) -> Path:
    """Write a tiny random checkpoint of the Qwen2.5-VL family to `path`, replacing an existing folder."""
    tokenizer = _tokenizer()
    parameters = qwen2_5_vl.tiny_parameters(tokenizer, layers, hidden)
    text = parameters.pop("text_config")
    rope = text.pop("rope_parameters")
    config = {
        "architectures": ["video_SALMONN2_plus"],
        "model_type": "qwen2_5_vl",
        **text,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        **parameters,
        "audio_config": audio_parameters(hidden),
        "audio_token_id": tokenizer.convert_tokens_to_ids(TOKENS["audio_token"]),
    }
    parsed = VideoSalmonn2Qwen2_5Config(**config)
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28}
    processors = (Qwen2VLImageProcessor(size=size), Qwen2VLVideoProcessor(size=size), tokenizer)
    return write_tiny(
        path,
        seed,
        lambda: modeling.VideoSalmonn2Qwen2_5ForConditionalGeneration(parsed),
        processors,
        config,
        lambda name: qwen2_5_vl.hub_name(keys.published(name, "audio.")),
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(TOKENS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

"""Configurations of video-SALMONN 2+: transformers' vision-language configurations with an audio section.

Published files are accepted unchanged: flat (3B, 7B, 72B) or nested (4B, 8B), with BERT's key names for the Q-Former.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import Blip2QFormerConfig, Qwen2_5_VLConfig, Qwen3VLConfig, WhisperConfig

# Defaults of the released code for keys that a published file lacks.
QFORMER_DEFAULTS = {
    "hidden_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "intermediate_size": 12288,
    "encoder_width": 1280,
    "query_length": 1,
    "cross_attention_freq": 1,
}
TEXT_DEFAULTS = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128_000,
    "rms_norm_eps": 1e-6,
}
VISION_DEFAULTS = {"hidden_size": 1280}
TIME_IDS_PER_SECOND = 2
"""Time ids per second of video in the Qwen2.5-VL family; the value in configuration files is ignored."""


class VideoSalmonn2AudioConfig(WhisperConfig):
    """Whisper encoder, Q-Former with one query per window of encoder states, projection to the decoder."""

    model_type = "video_salmonn2_audio"
    base_config_key = "audio_config"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {"qformer_config": Blip2QFormerConfig}

    num_mel_bins: int = 128
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    d_model: int = 1280
    qformer_config: dict | Blip2QFormerConfig | None = None
    query_length: int = 1
    second_per_window: float = 0.5
    second_stride: float = 0.5
    output_dim: int = 3584
    is_encoder_decoder: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Convert the Q-Former section of published files (BERT's key names) to `Blip2QFormerConfig`."""
        section = self.qformer_config or {}
        if isinstance(section, dict) and "encoder_hidden_size" not in section:
            published = {**QFORMER_DEFAULTS, **section}
            self.query_length = published.get("query_length", self.query_length)
            self.output_dim = published.get("out_hidden_size", self.output_dim)
            known = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
            more = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps")
            self.qformer_config = {key: published[key] for key in (*known, *more) if key in published} | {
                "encoder_hidden_size": published["encoder_width"],
                "cross_attention_frequency": published.get("cross_attention_freq", 1),
                "use_qformer_text_input": False,
            }
        super().__post_init__(**kwargs)


class _OwnType:
    """Replace the model type in a configuration file: published files have that of the base model."""

    model_type: ClassVar[str]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return super().from_dict({**config_dict, "model_type": cls.model_type}, **kwargs)  # pyright: ignore


class VideoSalmonn2Config(_OwnType, Qwen3VLConfig):
    """The Qwen3-VL family (4B, 8B)."""

    model_type = "video_salmonn2"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        **Qwen3VLConfig.sub_configs_defaults,
        "audio_config": VideoSalmonn2AudioConfig,
    }

    audio_config: dict | VideoSalmonn2AudioConfig | None = None
    audio_token_id: int = 151669

    def __post_init__(self, **kwargs: Any) -> None:
        """Set the output size of the audio branch to the hidden size of the decoder."""
        super().__post_init__(**kwargs)
        self.audio_config.output_dim = self.text_config.hidden_size  # pyright: ignore


class VideoSalmonn2Qwen2_5Config(_OwnType, Qwen2_5_VLConfig):
    """The Qwen2.5-VL family (3B, 7B, 72B)."""

    model_type = "video_salmonn2_qwen2_5"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        **Qwen2_5_VLConfig.sub_configs_defaults,
        "audio_config": VideoSalmonn2AudioConfig,
    }

    audio_config: dict | VideoSalmonn2AudioConfig | None = None
    audio_token_id: int = 151665

    def __post_init__(self, **kwargs: Any) -> None:
        """Apply the defaults of the released code; output size of the audio branch as in `VideoSalmonn2Config`."""
        if self.text_config is None:
            kwargs = {**TEXT_DEFAULTS, **kwargs}
        if self.vision_config is None or isinstance(self.vision_config, dict):
            self.vision_config = {**VISION_DEFAULTS, **(self.vision_config or {})}
        super().__post_init__(**kwargs)
        self.vision_config.tokens_per_second = TIME_IDS_PER_SECOND  # pyright: ignore
        self.audio_config.output_dim = self.text_config.hidden_size  # pyright: ignore


def is_qwen2_5(config: dict[str, Any]) -> bool:
    """Whether a configuration belongs to the Qwen2.5-VL family (flat as published, nested if saved by transformers)."""
    text = config.get("text_config")
    return text is None or "qwen2_5" in text.get("model_type", "")

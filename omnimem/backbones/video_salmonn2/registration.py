"""Register both families of video-SALMONN 2+ with transformers: auto classes and weight names."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from omnimem.backbones.video_salmonn2 import configuration, keys, modeling
from omnimem.backbones.video_salmonn2.processing import VideoSalmonn2Processor

FAMILIES = (
    (configuration.VideoSalmonn2Config, modeling.VideoSalmonn2Model, modeling.VideoSalmonn2ForConditionalGeneration),
    (
        configuration.VideoSalmonn2Qwen2_5Config,
        modeling.VideoSalmonn2Qwen2_5Model,
        modeling.VideoSalmonn2Qwen2_5ForConditionalGeneration,
    ),
)
"""Configuration, model without and model with output projection, of the Qwen3-VL and of the Qwen2.5-VL family."""


def register() -> None:
    """Make the auto classes of transformers load exports and published checkpoints."""
    keys.register()
    for config, model, generating_model in FAMILIES:
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, model)
        AutoModelForImageTextToText.register(config, generating_model)
        AutoProcessor.register(config, VideoSalmonn2Processor)

"""video-SALMONN 2+, Qwen3-VL family (4B, 8B); the Qwen2.5-VL family (3B, 7B, 72B) is in `qwen2_5`.

Importing this package registers both with transformers' auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from omnimem.backbones.video_salmonn2 import configuration, keys, modeling
from omnimem.backbones.video_salmonn2.processing import VideoSalmonn2Processor

keys.register()
for _config, _model, _generating in (
    (configuration.VideoSalmonn2Config, modeling.VideoSalmonn2Model, modeling.VideoSalmonn2ForConditionalGeneration),
    (
        configuration.VideoSalmonn2Qwen2_5Config,
        modeling.VideoSalmonn2Qwen2_5Model,
        modeling.VideoSalmonn2Qwen2_5ForConditionalGeneration,
    ),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForImageTextToText.register(_config, _generating)
    AutoProcessor.register(_config, VideoSalmonn2Processor)

from omnimem.backbones.video_salmonn2.backbone import VideoSalmonn2 as BACKBONE  # noqa: E402

__all__ = ["BACKBONE"]

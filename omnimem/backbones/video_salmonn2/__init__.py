"""video-SALMONN 2+, Qwen3-VL family (4B, 8B); the Qwen2.5-VL family (3B, 7B, 72B) is in `qwen2_5`.

Importing this package registers both families with transformers' auto classes.
"""

from omnimem.backbones.video_salmonn2.backbone import VideoSalmonn2 as BACKBONE
from omnimem.backbones.video_salmonn2.registration import register

register()

__all__ = ["BACKBONE"]

"""video-SALMONN 2+, Qwen2.5-VL family (3B, 7B, 72B)."""

from omnimem.backbones.video_salmonn2.backbone import VideoSalmonn2Qwen2_5 as BACKBONE

__all__ = ["BACKBONE"]

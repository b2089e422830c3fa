"""Qwen2.5-VL (video only)."""

from omnimem.backbones.qwen2_5_vl.backbone import Qwen2_5VL as BACKBONE

__all__ = ["BACKBONE"]

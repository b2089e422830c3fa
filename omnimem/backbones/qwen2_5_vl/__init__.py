"""Qwen2.5-VL (video without sound)."""

from omnimem.backbones.qwen2_5_vl.backbone import Qwen2_5VL as BACKBONE

__all__ = ["BACKBONE"]

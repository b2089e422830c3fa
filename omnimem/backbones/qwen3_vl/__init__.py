"""Qwen3-VL (video without sound)."""

from omnimem.backbones.qwen3_vl.backbone import Qwen3VL as BACKBONE

__all__ = ["BACKBONE"]

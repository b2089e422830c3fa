"""Qwen2.5-Omni (thinker)."""

from omnimem.backbones.qwen2_5_omni.backbone import Qwen2_5Omni as BACKBONE

__all__ = ["BACKBONE"]

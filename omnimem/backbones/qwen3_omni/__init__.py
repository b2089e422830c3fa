"""Qwen3-Omni (thinker): mixture of experts."""

from omnimem.backbones.qwen3_omni.backbone import Qwen3Omni as BACKBONE

__all__ = ["BACKBONE"]

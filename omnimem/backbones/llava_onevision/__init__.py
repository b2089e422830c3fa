"""LLaVA-OneVision (video without sound)."""

from omnimem.backbones.llava_onevision.backbone import LlavaOnevision as BACKBONE

__all__ = ["BACKBONE"]

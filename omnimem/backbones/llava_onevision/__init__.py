"""LLaVA-OneVision (video only)."""

from omnimem.backbones.llava_onevision.backbone import LlavaOnevision as BACKBONE

__all__ = ["BACKBONE"]

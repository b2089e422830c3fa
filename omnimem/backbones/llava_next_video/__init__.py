"""LLaVA-NeXT-Video (video only)."""

from omnimem.backbones.llava_next_video.backbone import LlavaNextVideo as BACKBONE

__all__ = ["BACKBONE"]

"""VideoLLaMA 3 (video only)."""

from omnimem.backbones.video_llama_3.backbone import VideoLlama3 as BACKBONE

__all__ = ["BACKBONE"]

"""Frames of a chunk to decoder inputs, with the video processor and vision tower of transformers.

Frames are resized independently and the vision towers attend within one temporal patch, so encoding chunk by chunk
equals encoding the whole clip, and only the pixels and embeddings of one chunk are in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize
from transformers.video_processing_utils import BaseVideoProcessor


@dataclass(frozen=True)
class PixelLimits:
    """Minimum and maximum number of pixels of a resized frame; both sides are multiples of `factor`."""

    least: int
    most: int
    factor: int

    @property
    def size(self) -> dict[str, int]:
        """The limits as `size` of transformers' image processors."""
        return {"shortest_edge": self.least, "longest_edge": self.most}

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a frame after resizing."""
        return smart_resize(height, width, self.factor, self.least, self.most)

    def tokens(self, height: int, width: int) -> int:
        """Tokens per temporal patch for frames of this size."""
        resized_height, resized_width = self.resized(height, width)
        return (resized_height // self.factor) * (resized_width // self.factor)


@dataclass(frozen=True)
class FramePatches:
    """Encoded temporal patches of a chunk: P patches of N tokens.

    Attributes
    ----------
    embeds : Tensor
        ``[P, N, C]``.
    deepstack : Tensor or None
        ``[L, P, N, C]``, see `ChunkInputs`.
    height, width : int
        Tokens per patch along each side; N is their product.
    """

    embeds: Tensor
    deepstack: Tensor | None
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.embeds)


def encode_frames(backbone: Any, frames: np.ndarray, limits: PixelLimits) -> FramePatches:
    """Encode frames uint8 ``[T, H, W, 3]``; the processor repeats the last frame to fill a temporal patch."""
    pixels, grid = patchify(backbone.processor.video_processor, frames, limits)
    grid = grid.to(backbone.device)
    features = backbone.model.get_video_features(pixels.to(backbone.device), grid)
    count, height, width = grid[0].tolist()
    merge = backbone.processor.video_processor.merge_size
    height, width = height // merge, width // merge
    # Some models return one tensor per video (there is one video), others a single tensor.
    deepstack = [_as_tensor(layer) for layer in getattr(features, "deepstack_features", None) or ()]
    return FramePatches(
        embeds=_as_tensor(features.pooler_output).view(count, height * width, -1),
        deepstack=torch.stack(deepstack).view(len(deepstack), count, height * width, -1) if deepstack else None,
        height=height,
        width=width,
    )


def patchify(processor: BaseVideoProcessor, frames: np.ndarray, limits: PixelLimits) -> tuple[Tensor, Tensor]:
    """Pixels ``[P * h * w, D]`` and grid ``[1, 3]`` of frames uint8 ``[T, H, W, 3]``, each resized independently.

    Some video processors divide a pixel budget by the number of frames of the clip, which a stream does not know.
    Frames are therefore resized here and passed with `do_resize=False`.
    """
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    height, width = limits.resized(*video.shape[-2:])
    resized = BaseVideoProcessor.resize(
        processor,
        video[None],
        size=SizeDict(height=height, width=width),
        resample=processor.resample,  # pyright: ignore
    )
    processed = processor(
        videos=[resized[0]], do_resize=False, do_sample_frames=False, cap_pixels_per_frame=False, return_tensors="pt"
    )
    return processed["pixel_values_videos"], processed["video_grid_thw"]


def _as_tensor(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else torch.cat(list(features))

"""Pictures of a chunk as decoder inputs, on the stock processor and vision tower.

Every frame is resized by itself and the towers never look beyond a temporal patch, so a chunk gives what the whole clip
would, and no more than a chunk is ever in memory as pixels or embeddings.
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
    """Fewest and most pixels of a resized frame, and what its sides are multiples of."""

    least: int
    most: int
    factor: int

    @property
    def size(self) -> dict[str, int]:
        """The same in the words of the stock processor of single frames."""
        return {"shortest_edge": self.least, "longest_edge": self.most}

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Sides of a frame after the resize."""
        return smart_resize(height, width, self.factor, self.least, self.most)

    def tokens(self, height: int, width: int) -> int:
        """Positions of a temporal patch of such frames."""
        resized_height, resized_width = self.resized(height, width)
        return (resized_height // self.factor) * (resized_width // self.factor)


@dataclass(frozen=True)
class FramePatches:
    """Temporal patches of a chunk.

    Attributes
    ----------
    embeds : Tensor
        ``[P, N, C]``.
    deepstack : Tensor or None
        ``[L, P, N, C]``, see `ChunkInputs`.
    height, width : int
        Positions of a patch by side; N is their product.
    """

    embeds: Tensor
    deepstack: Tensor | None
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.embeds)


def encode_frames(backbone: Any, frames: np.ndarray, limits: PixelLimits) -> FramePatches:
    """Encode frames uint8 ``[T, H, W, 3]``; an odd last one is repeated, as the stock processor does."""
    pixels, grid = patchify(backbone.processor.video_processor, frames, limits)
    grid = grid.to(backbone.device)
    features = backbone.model.get_video_features(pixels.to(backbone.device), grid)
    count, height, width = grid[0].tolist()
    merge = backbone.processor.video_processor.merge_size
    height, width = height // merge, width // merge
    # One tuple entry a video, of which there is one; some models leave them uncut.
    deepstack = [_whole(layer) for layer in getattr(features, "deepstack_features", None) or ()]
    return FramePatches(
        embeds=_whole(features.pooler_output).view(count, height * width, -1),
        deepstack=torch.stack(deepstack).view(len(deepstack), count, height * width, -1) if deepstack else None,
        height=height,
        width=width,
    )


def patchify(processor: BaseVideoProcessor, frames: np.ndarray, limits: PixelLimits) -> tuple[Tensor, Tensor]:
    """Pixels ``[P * h * w, D]`` and grid ``[1, 3]`` of frames, each resized by itself.

    The stock resize of some models divides a budget of pixels by the number of frames, which a stream does not know.
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


def _whole(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else torch.cat(list(features))

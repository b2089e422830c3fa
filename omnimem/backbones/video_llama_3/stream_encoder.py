"""The layout of VideoLLaMA 3: ``[opening]Time 0.0s:[frame],Time 1.0s:[what changed],Time 2.0s:…``, then the question.

A position whose pixels are those of the frame before, or nearly so, is left out; the last frame of a chunk is kept to
compare the next one with. Text stays in memory for good, so for long streams the time is written every few frames only,
until it is there at most `timestamps` times. Rotary ids count on like those of text; the second and third row say where
in its frame a position is, which the decoder does not look at (selection may).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from omnimem.backbones.base import ChunkInputs
from omnimem.backbones.layout import LayoutEncoder, TokenSpan, patch_ids, patches_per_timestamp
from omnimem.media import Chunk
from omnimem.modality import VISUAL


class VideoLlama3StreamEncoder(LayoutEncoder):
    """Encoder of one stream; see `Backbone.stream_encoder` for the parameters."""

    def __init__(self, backbone: Any, **asked: Any) -> None:
        super().__init__(backbone, **asked)
        frames = None if self.duration is None else math.ceil(self.duration * self.fps)
        self.limits = backbone.frame_limits(frames, self.max_pixels)
        self.frames_per_time = patches_per_timestamp(frames, self.timestamps)
        self.frames_seen = 0
        self.last_frame: Tensor | None = None

    def prefix(self) -> ChunkInputs:
        """Start of the user's turn."""
        return self.join([self.text(self.backbone.opening_ids)])

    def closing(self) -> ChunkInputs:
        """Nothing: the question follows the last frame."""
        return self.join([])

    def encode(self, chunk: Chunk) -> ChunkInputs:
        """Encode a chunk that starts where the last one ended.

        Parameters
        ----------
        chunk : Chunk
            Frames uint8 ``[T, H, W, 3]`` of ``[t0, t1)``.

        Returns
        -------
        ChunkInputs
            One row: times, and of each frame the positions that changed, one at least.

        Raises
        ------
        OmniMemError
            The chunk does not begin at a frame.
        """
        self.check_start(chunk)
        pieces: list[TokenSpan] = []
        if len(chunk.frames):
            embeds, kept, height, width = self._encode_frames(chunk)
            for i, time in enumerate(chunk.frame_times.tolist()):
                if self.frames_seen % self.frames_per_time == 0:
                    comma = "," if self.frames_seen > 0 else ""
                    pieces.append(self.text(self.backbone.text_ids(f"{comma}Time {time:.1f}s:")))
                ids = patch_ids(torch.zeros(1), height, width)[:, kept[i]]
                ids[0] = torch.arange(ids.shape[1]) + int(self.next_position_id)
                pieces.append(TokenSpan(embeds[i, kept[i]], ids, VISUAL, torch.full((ids.shape[1],), time)))
                self.next_position_id += ids.shape[1]
                self.frames_seen += 1
        return self.join(pieces)

    def _encode_frames(self, chunk: Chunk) -> tuple[Tensor, Tensor, int, int]:
        """Embeddings ``[T, N, C]``, which of them stay ``[T, N]``, and the positions of a frame by side."""
        processor, device = self.backbone.processor.video_processor, self.backbone.device
        count = len(chunk.frames)
        processed = processor(
            videos=[torch.from_numpy(chunk.frames).permute(0, 3, 1, 2)],
            # The stock resize divides the upper limit among the frames it is given.
            size={"shortest_edge": self.limits.least, "longest_edge": count * self.limits.most},
            do_sample_frames=False,
            use_token_compression=False,
            return_tensors="pt",
        )
        pixels, grid, merge = (processed[key] for key in ("pixel_values_videos", "video_grid_thw", "video_merge_sizes"))
        features = self.backbone.model.get_video_features(
            pixels.to(device), grid.to(device), video_merge_sizes=merge.to(device)
        )
        embeds, (height, width) = features.pooler_output[0].unflatten(0, (count, -1)), (grid[0, 1:] // merge).tolist()
        return embeds, self._changed(pixels, grid, merge), height, width

    def _changed(self, pixels: Tensor, grid: Tensor, merge: Tensor) -> Tensor:
        """Which positions the stock processor would keep, as bool ``[T, N]``; pixels ``[T · h · w, D]``."""
        processor, count = self.backbone.processor.video_processor, int(grid[0, 0])
        if not processor.use_token_compression:
            return torch.ones(count, int(grid[0, 1:].prod() // merge**2), dtype=torch.bool)
        # The first frame of a stream is kept whole; that of a later chunk is compared as any other.
        before, self.last_frame = self.last_frame, pixels.unflatten(0, (count, -1))[-1].clone()
        if before is not None:
            pixels, grid = torch.cat((before, pixels)), grid + torch.tensor([1, 0, 0])
        return processor._get_compression_mask(pixels, grid, merge).unflatten(0, (int(grid[0, 0]), -1))[-count:]

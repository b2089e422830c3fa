"""Stream encoder of VideoLLaMA 3: ``[prompt]Time 0.0s:[frame],Time 1.0s:[changes],Time 2.0s:…``, then the question.

Tokens whose pixels barely differ from the previous frame are dropped; the last frame of a chunk is stored to compare
the next one with it. Text is never evicted, so in long streams a timestamp is written only every few frames, at most
`timestamps` times. The decoder uses 1-D RoPE: its position ids (first axis) count up like text. The second and third
axis hold row and column of a token in its frame; only token selection may use them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from omnimem.backbones.chunk_inputs import ChunkInputs
from omnimem.backbones.layout import LayoutEncoder, TokenSpan, patch_position_ids, patches_per_timestamp
from omnimem.backbones.rope_1d import Rope1DBackbone
from omnimem.backbones.vision import PixelLimits
from omnimem.media import Chunk
from omnimem.modality import VISUAL


class VideoLlama3StreamEncoder(LayoutEncoder):
    """Encoder of one stream; see `Backbone.stream_encoder` for the parameters."""

    backbone: Rope1DBackbone

    def __init__(self, backbone: Rope1DBackbone, **options: Any) -> None:
        super().__init__(backbone, **options)
        frames = None if self.duration is None else math.ceil(self.duration * self.fps)
        self.limits = frame_limits(backbone.processor.video_processor, frames, self.max_pixels)
        self.frames_per_time = patches_per_timestamp(frames, self.timestamps)
        self.frames_seen = 0
        self.last_frame: Tensor | None = None

    def prefix(self) -> ChunkInputs:
        """Start of the user turn."""
        return self.join([self.text(self.backbone.prompt_prefix_ids)])

    def closing(self) -> ChunkInputs:
        """No tokens: the question follows the last frame."""
        return self.join([])

    def encode(self, chunk: Chunk) -> ChunkInputs:
        """Encode the next chunk.

        Parameters
        ----------
        chunk : Chunk
            Frames uint8 ``[T, H, W, 3]`` of ``[t0, t1)`` seconds.

        Returns
        -------
        ChunkInputs
            Batch size 1: timestamps, and of each frame the tokens that changed, at least one.

        Raises
        ------
        OmniMemError
            The chunk does not start at a multiple of the chunk alignment.
        """
        self.check_start(chunk)
        spans: list[TokenSpan] = []
        if len(chunk.frames):
            embeds, changed, height, width = self._encode_frames(chunk)
            for i, time in enumerate(chunk.frame_times.tolist()):
                if self.frames_seen % self.frames_per_time == 0:
                    comma = "," if self.frames_seen > 0 else ""
                    spans.append(self.text(self.backbone.text_ids(f"{comma}Time {time:.1f}s:")))
                ids = patch_position_ids(torch.zeros(1), height, width)[:, changed[i]]
                ids[0] = torch.arange(ids.shape[1]) + int(self.next_position_id)
                spans.append(TokenSpan(embeds[i, changed[i]], ids, VISUAL, torch.full((ids.shape[1],), time)))
                self.next_position_id += ids.shape[1]
                self.frames_seen += 1
        return self.join(spans)

    def _encode_frames(self, chunk: Chunk) -> tuple[Tensor, Tensor, int, int]:
        """Embeddings ``[T, N, C]``, which of them changed (bool ``[T, N]``), and tokens per frame: height, width."""
        processor, device = self.backbone.processor.video_processor, self.backbone.device
        count = len(chunk.frames)
        processed = processor(
            videos=[torch.from_numpy(chunk.frames).permute(0, 3, 1, 2)],
            # The processor divides the upper limit by the number of frames.
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
        """Tokens that the processor keeps, bool ``[T, N]``, from pixels ``[T · h · w, D]``; stores the last frame."""
        processor, count = self.backbone.processor.video_processor, int(grid[0, 0])
        if not processor.use_token_compression:
            return torch.ones(count, int(grid[0, 1:].prod() // merge**2), dtype=torch.bool)
        # All tokens of the first frame are kept; the first frame of a later chunk is compared with the stored one.
        before, self.last_frame = self.last_frame, pixels.unflatten(0, (count, -1))[-1].clone()
        if before is not None:
            pixels, grid = torch.cat((before, pixels)), grid + torch.tensor([1, 0, 0])
        return processor._get_compression_mask(pixels, grid, merge).unflatten(0, (int(grid[0, 0]), -1))[-count:]


def frame_limits(processor: Any, frames: int | None, max_pixels: int | None) -> PixelLimits:
    """Limits of a resized frame in a clip of `frames` frames (None: unknown).

    As in transformers' video processor, the frames of a clip share one budget of pixels. Clips longer than the trained
    maximum, or of unknown length, get the limit of the longest trained clip.
    """
    shared = min(frames or processor.max_frames, processor.max_frames)
    most = min(processor.size["longest_edge"] // shared, max_pixels or processor.size["longest_edge"])
    return PixelLimits(min(processor.size["shortest_edge"], most), most, processor.patch_size * processor.merge_size)

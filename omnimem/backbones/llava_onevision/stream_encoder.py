"""A stream as frames, one behind the other: the layout of LLaVA-OneVision.

``<|im_start|>user [frame][frame]…[newline]``, then the question. Rotary ids count on like those of text; the second and
third row say where in its frame a position is, which the decoder does not look at (selection may). The newline is a
vector of the model's own at the end of the whole video, so no chunk holds it: it is part of what closes the media.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnimem.backbones.base import ChunkInputs
from omnimem.backbones.layout import LayoutEncoder, Piece, patch_ids
from omnimem.media import Chunk
from omnimem.modality import TEXT, VISUAL


class FrameEncoder(LayoutEncoder):
    """Encoder of one stream; see `Backbone.stream_encoder` for the parameters."""

    def __init__(self, backbone: Any, *, picture: bool, sound: bool, fps: float) -> None:
        super().__init__(backbone, picture=picture, sound=sound, alignment=backbone.chunk_alignment(fps, sound))

    def prefix(self) -> ChunkInputs:
        """Start of the user's turn."""
        return self.join([self.text(self.backbone.text_ids(self.backbone.opening))])

    def closing(self) -> ChunkInputs:
        """The newline behind the last frame."""
        newline = self.backbone.model.model.image_newline[None]
        ids = torch.full((3, 1), int(self.next_position))
        return self.join([Piece(newline, ids, TEXT, torch.full((1,), torch.nan))], self.next_position + 1)

    def encode(self, chunk: Chunk) -> ChunkInputs:
        """Encode a chunk.

        Parameters
        ----------
        chunk : Chunk
            Frames uint8 ``[T, H, W, 3]`` of ``[t0, t1)``.

        Returns
        -------
        ChunkInputs
            One row of T · N positions, N a frame.

        Raises
        ------
        OmniMemError
            The chunk does not begin at a frame.
        """
        self.check_start(chunk)
        if len(chunk.frames) == 0:
            return self.idle()
        embeds, side = self._embeds(chunk), self.backbone.frame_side
        ids = patch_ids(torch.arange(len(embeds)), side, side)
        ids[0] = torch.arange(ids.shape[1]) + int(self.next_position)
        seconds = torch.from_numpy(chunk.frame_times).float().repeat_interleave(side**2)
        self.next_position += ids.shape[1]
        return self.join([Piece(embeds.flatten(0, 1), ids, VISUAL, seconds)])

    def _embeds(self, chunk: Chunk) -> Tensor:
        """Embeddings ``[T, N, C]``; the stock processor resizes, and the tower sees, every frame by itself."""
        video = torch.from_numpy(chunk.frames).permute(0, 3, 1, 2)
        processor = self.backbone.processor.video_processor
        pixels = processor(videos=[video], do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]
        features = self.backbone.model.get_video_features(pixels.to(self.backbone.device)).pooler_output
        # The stock model ends whatever it is given with a newline.
        return features[0, :-1].unflatten(0, (len(video), -1))

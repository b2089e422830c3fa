"""What the LLaVA family shares: a stream as frames of one size, one behind the other.

``[opening][frame][frame]…[question]``. Rotary ids count on like those of text; the second and third row say where in
its frame a position is, which the decoder does not look at (selection may).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from omnimem.backbones.base import ChunkInputs
from omnimem.backbones.layout import LayoutEncoder, TokenSpan, patch_ids
from omnimem.backbones.rope_1d import Rope1DBackbone
from omnimem.errors import OmniMemError
from omnimem.media import Chunk
from omnimem.modality import VISUAL


class LlavaStreamEncoder(LayoutEncoder):
    """Encoder of one stream; see `Backbone.stream_encoder` for the parameters."""

    def __init__(self, backbone: Any, **asked: Any) -> None:
        super().__init__(backbone, **asked)
        side = backbone.config.vision_config.image_size
        if self.max_pixels is not None and self.max_pixels < side**2:
            raise OmniMemError(
                f"max_pixels={self.max_pixels}: {backbone.name} sees every frame at {side}×{side} ({side**2} pixels); "
                "use fewer frames a second instead"
            )

    def prefix(self) -> ChunkInputs:
        """Start of the user's turn."""
        return self.join([self.text(self.backbone.opening_ids)])

    def closing(self) -> ChunkInputs:
        """Nothing: the question follows the last frame."""
        return self.join([])

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
            return self.empty_step()
        # The stock processor resizes, and the tower sees, every frame by itself.
        video = torch.from_numpy(chunk.frames).permute(0, 3, 1, 2)
        processor = self.backbone.processor.video_processor
        pixels = processor(videos=[video], do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]
        embeds, side = self.frame_embeds(pixels.to(self.backbone.device)), self.backbone.frame_side
        ids = patch_ids(torch.arange(len(video)), side, side)
        ids[0] = torch.arange(ids.shape[1]) + int(self.next_position_id)
        seconds = torch.from_numpy(chunk.frame_times).float().repeat_interleave(side**2)
        self.next_position_id += ids.shape[1]
        return self.join([TokenSpan(embeds, ids, VISUAL, seconds)])

    def frame_embeds(self, pixels: Tensor) -> Tensor:
        """Embeddings ``[T · N, C]`` of frames ``[1, T, 3, S, S]``."""
        return self.backbone.model.get_video_features(pixels).pooler_output[0]


class LlavaBackbone(Rope1DBackbone):
    """Sees a stream frame by frame, all of them at the size of its tower; see `Rope1DBackbone` for the parameters.

    The ids of frames soon use up the range a decoder was trained on; beyond it a stream warns.
    ``selection.position_ids=compact`` keeps a stream of any length inside: positions that were evicted give their ids
    back.

    Attributes
    ----------
    encoder_class : type
        Encoder of a stream.
    """

    projectors: ClassVar[dict[str, str]] = {"visual": "multi_modal_projector"}
    skip_quantization_modules: ClassVar[tuple[str, ...]] = (
        "model.vision_tower",
        "model.multi_modal_projector",
        "lm_head",
    )
    encoder_class: ClassVar[type[LlavaStreamEncoder]] = LlavaStreamEncoder

    @property
    @abstractmethod
    def frame_side(self) -> int:
        """Positions by side of a frame."""

    def tokens_per_chunk(
        self,
        *,
        frame_size: tuple[int, int] | None,
        audio: bool,
        fps: float,
        seconds: float,
        chunk_seconds: float,
        max_pixels: int | None = None,
    ) -> list[tuple[int, int]]:
        """As many positions a frame, whatever its size."""
        per_frame = 0 if frame_size is None else self.frame_side**2
        starts = [number * chunk_seconds for number in range(math.ceil(seconds / chunk_seconds))]
        return [(math.ceil(min(chunk_seconds, seconds - start) * fps) * per_frame, 0) for start in starts]


def hub_name(name: str) -> str:
    """Key of a weight in the published checkpoints."""
    name = name.replace("model.language_model.", "language_model.model.", 1)
    name = name.replace("lm_head.", "language_model.lm_head.", 1)
    return name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.", 1)

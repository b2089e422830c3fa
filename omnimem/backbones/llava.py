"""Shared by the LLaVA family: stream encoder and backbone for frames of one fixed size.

``[prompt][frame][frame]…[question]``. The decoder uses 1-D RoPE: its position ids (first axis) count up like text. The
second and third axis hold row and column of a token in its frame; only token selection may use them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from omnimem.backbones.chunk_inputs import ChunkInputs
from omnimem.backbones.layout import LayoutEncoder, TokenSpan, patch_position_ids
from omnimem.backbones.rope_1d import Rope1DBackbone
from omnimem.errors import OmniMemError
from omnimem.media import Chunk
from omnimem.modality import VISUAL


class LlavaStreamEncoder(LayoutEncoder):
    """Encoder of one stream; see `Backbone.stream_encoder` for the parameters."""

    backbone: LlavaBackbone

    def __init__(self, backbone: LlavaBackbone, **options: Any) -> None:
        super().__init__(backbone, **options)
        side = backbone.config.vision_config.image_size
        if self.max_pixels is not None and self.max_pixels < side**2:
            raise OmniMemError(
                f"max_pixels={self.max_pixels}: {backbone.name} resizes every frame to {side}×{side} "
                f"({side**2} pixels); lower fps instead"
            )

    def prefix(self) -> ChunkInputs:
        """Start of the user turn."""
        return self.join([self.text(self.backbone.prompt_prefix_ids)])

    def closing(self) -> ChunkInputs:
        """No tokens: the question follows the last frame."""
        return self.join([])

    def encode(self, chunk: Chunk) -> ChunkInputs:
        """Encode a chunk.

        Parameters
        ----------
        chunk : Chunk
            Frames uint8 ``[T, H, W, 3]`` of ``[t0, t1)`` seconds.

        Returns
        -------
        ChunkInputs
            Batch size 1, T · N tokens: N per frame.

        Raises
        ------
        OmniMemError
            The chunk does not start at a multiple of the chunk alignment.
        """
        self.check_start(chunk)
        if len(chunk.frames) == 0:
            return self.empty_step()
        # Processor and vision tower treat frames independently, so encoding by chunks is exact.
        video = torch.from_numpy(chunk.frames).permute(0, 3, 1, 2)
        processor = self.backbone.processor.video_processor
        pixels = processor(videos=[video], do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]
        embeds, side = self.frame_embeds(pixels.to(self.backbone.device)), self.backbone.frame_side
        ids = patch_position_ids(torch.arange(len(video)), side, side)
        ids[0] = torch.arange(ids.shape[1]) + int(self.next_position_id)
        seconds = torch.from_numpy(chunk.frame_times).float().repeat_interleave(side**2)
        self.next_position_id += ids.shape[1]
        return self.join([TokenSpan(embeds, ids, VISUAL, seconds)])

    def frame_embeds(self, pixels: Tensor) -> Tensor:
        """Embeddings ``[T · N, C]`` of preprocessed frames ``[1, T, 3, S, S]``."""
        return self.backbone.model.get_video_features(pixels).pooler_output[0]


class LlavaBackbone(Rope1DBackbone):
    """A model that encodes every frame at the fixed input size of its vision tower; see `Rope1DBackbone`.

    Every token takes one position id, so long streams exceed the trained range and a warning is logged;
    ``selection.position_ids=compact``, which reuses the ids of evicted tokens, keeps streams of any length in range.
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
        """Tokens per frame along each side."""

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
        """The same number of tokens for every frame; see `Backbone.tokens_per_chunk`."""
        per_frame = 0 if frame_size is None else self.frame_side**2
        starts = [number * chunk_seconds for number in range(math.ceil(seconds / chunk_seconds))]
        return [(math.ceil(min(chunk_seconds, seconds - start) * fps) * per_frame, 0) for start in starts]


def hub_name(name: str) -> str:
    """Key of a weight in the published checkpoints, from its name in the transformers model."""
    name = name.replace("model.language_model.", "language_model.model.", 1)
    name = name.replace("lm_head.", "language_model.lm_head.", 1)
    return name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.", 1)

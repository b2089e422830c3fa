"""The layout of LLaVA-OneVision: ``<|im_start|>user [frame][frame]…[newline]``, then the question.

The newline is a vector of the model's own at the end of the whole video, so no chunk holds it: it is part of what
closes the media.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omnimem.backbones.base import ChunkInputs
from omnimem.backbones.layout import TokenSpan
from omnimem.backbones.llava import LlavaStreamEncoder
from omnimem.modality import TEXT


class LlavaOnevisionStreamEncoder(LlavaStreamEncoder):
    """Encoder of one stream; see `Backbone.stream_encoder` for the parameters."""

    def closing(self) -> ChunkInputs:
        """The newline behind the last frame."""
        newline = self.backbone.model.model.image_newline[None]
        ids = torch.full((3, 1), int(self.next_position_id))
        return self.join([TokenSpan(newline, ids, TEXT, torch.full((1,), torch.nan))], self.next_position_id + 1)

    def frame_embeds(self, pixels: Tensor) -> Tensor:
        """Embeddings ``[T · N, C]``; the stock model ends whatever it is given with a newline."""
        return super().frame_embeds(pixels)[:-1]

"""A stream as one span of patches: the layout of Qwen2.5-VL, and of models that hear built on it.

``<|vision_start|>[patch][its sound][patch][its sound]…[sound left over]<|vision_end|>``; a model that does not hear has
the patches alone. Rotary ids of a patch are (start + ⌊t·tokens_per_second⌋, start + h, start + w).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from omnimem.backbones.base import ChunkInputs
from omnimem.backbones.layout import LayoutEncoder, TokenSpan, patch_ids
from omnimem.backbones.vision import FramePatches, encode_frames
from omnimem.errors import OmniMemError
from omnimem.media import Chunk
from omnimem.modality import AUDIO, VISUAL


class Qwen2_5VLStreamEncoder(LayoutEncoder):
    """Encoder of one stream; see `Backbone.stream_encoder` for the other parameters.

    Parameters
    ----------
    position_layout : {"train", "release"}
        Ids of a stream with sound. ``train``: those the models were trained with, sound (start + i, start, start + i),
        text one past the largest time id. ``release``: what the published inference code computes, which knows
        nothing of sound: the first positions of the span get the ids of all patches, whatever they are, the others
        count on like text. For it the duration must be known, and be that of the pictures.
    """

    def __init__(self, backbone: Any, **asked: Any) -> None:
        super().__init__(backbone, **asked)
        audio_encoder = backbone.audio_encoder()
        self.audio_encoder = audio_encoder if self.has_audio else None
        self.audio_tokens_per_second = 1.0 if audio_encoder is None else audio_encoder.tokens_per_second
        self.limits = backbone.pixel_limits(self.max_pixels)
        self.opening_ids = backbone.text_ids(backbone.opening)
        per_second = float(backbone.config.vision_config.tokens_per_second)
        self.time_scale = self.choose_time_scale(per_second, self.opening_ids.shape[1])
        # In float32 and this order, as the models compute it.
        self.seconds_per_patch = torch.tensor(backbone.temporal_patch / self.fps)
        self.ids_per_patch = self.seconds_per_patch * (per_second * self.time_scale)
        self.promised: int | None = None
        if self.position_layout == "release" and self.has_video and self.has_audio:
            if self.duration is None:
                raise OmniMemError("position_layout=release needs media whose header says how long they are")
            self.promised = -(-math.ceil(self.duration * self.fps) // backbone.temporal_patch)
        self.pending_audio = torch.empty(0, backbone.config.get_text_config().hidden_size)
        self.start = self.highest = 0
        self.patches_seen = self.audio_seen = self.placed = 0
        self.sides = (0, 0)

    def prefix(self) -> ChunkInputs:
        """System and user turn and ``<|vision_start|>``."""
        opening = self.text(torch.cat((self.opening_ids, torch.tensor([[self.backbone.vision_start]])), dim=1))
        self.start = int(self.next_position_id)
        self.highest = self.start - 1
        return self.join([opening])

    def closing(self) -> ChunkInputs:
        """``<|vision_end|>``."""
        end = self.text(torch.tensor([[self.backbone.vision_end]]), [self.next_position_id])
        return self.join([end], self.next_position_id + 1)

    def encode(self, chunk: Chunk) -> ChunkInputs:
        """Encode a chunk that starts where the last one ended.

        Parameters
        ----------
        chunk : Chunk
            Frames uint8 ``[T, H, W, 3]`` and 16 kHz sound of ``[t0, t1)``.

        Returns
        -------
        ChunkInputs
            One row: every patch, followed by the sound of its time.

        Raises
        ------
        OmniMemError
            The chunk does not begin at a boundary of the encoders.
        """
        self.check_start(chunk)
        pieces = []
        if self.audio_encoder is not None and chunk.audio is not None:
            self.pending_audio = self.audio_encoder(chunk)
        if self.has_video and len(chunk.frames):
            patches = encode_frames(self.backbone, chunk.frames, self.limits)
            for i in range(len(patches)):
                pieces.append(self._patch(patches, i))
                until = int(self.patches_seen * self.seconds_per_patch * self.audio_tokens_per_second)
                pieces.append(self._sound(until - self.audio_seen))
        # What is left: more sound than picture, or a sound encoder's padding.
        pieces.append(self._sound(len(self.pending_audio)))
        pieces = [piece for piece in pieces if len(piece)]
        if pieces:
            self.next_position_id = self.highest + 1
        return self.join(pieces)

    def _patch(self, patches: FramePatches, i: int) -> TokenSpan:
        number, self.patches_seen = self.patches_seen, self.patches_seen + 1
        seconds = (number * self.seconds_per_patch).float()
        count = patches.height * patches.width
        if self.promised is not None:
            self.sides = (patches.height, patches.width)
            ids = self._released(count)
        else:
            ids = patch_ids(torch.tensor([number]), patches.height, patches.width, self.ids_per_patch) + self.start
            # With sound, text goes on behind the largest time id; without, behind the largest of all.
            self.highest = max(self.highest, int((ids[0] if self.has_audio else ids).max()))
        deepstack = None if patches.deepstack is None else patches.deepstack[:, i]
        return TokenSpan(patches.embeds[i], ids, VISUAL, seconds.expand(count), deepstack)

    def _sound(self, count: int) -> TokenSpan:
        """The next `count` positions of what was heard, or as many as there are."""
        count = min(max(0, count), len(self.pending_audio))
        embeds, self.pending_audio = self.pending_audio[:count], self.pending_audio[count:]
        numbers = torch.arange(self.audio_seen, self.audio_seen + count)
        self.audio_seen += count
        if self.promised is not None:
            ids = self._released(count)
        else:
            time = (numbers * self.time_scale).long()
            # A stream of sound alone is counted like text.
            ids = torch.stack((time, torch.zeros_like(time) if self.has_video else time, time)) + self.start
            self.highest = max([self.highest, *ids[0].tolist()])
        return TokenSpan(embeds, ids, AUDIO, numbers / self.audio_tokens_per_second)

    def _released(self, count: int) -> Tensor:
        """Ids of the next positions of the span in the released layout, whatever they are."""
        assert self.promised is not None
        height, width = self.sides
        patch = height * width
        numbers = torch.arange(self.placed, self.placed + count)
        self.placed += count
        # Only the patches that some of these positions fall into: a long stream has many.
        first = min(self.placed - count, self.promised * patch) // patch
        stop = min(-(-self.placed // patch), self.promised)
        pictures = patch_ids(torch.arange(first, stop), height, width, self.ids_per_patch)
        inside = pictures[:, numbers[numbers < self.promised * patch] - first * patch]
        largest = max(int((self.promised - 1) * self.ids_per_patch), height - 1, width - 1)
        text = numbers[numbers >= self.promised * patch] - self.promised * patch + largest + 1
        ids = torch.cat((inside, text.expand(3, -1)), dim=1) + self.start
        self.highest = max([self.highest, *ids.flatten().tolist()])
        return ids

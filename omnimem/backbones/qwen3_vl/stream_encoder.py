"""A stream as groups of patches with the time written before each: the layout of Qwen3-VL and models built on it.

``<12.5 seconds><|vision_start|>[patches of the group][their sound]<|vision_end|>`` and so on; as trained, a group is
one temporal patch. Text stays in memory for good, so for long streams patches are grouped until there are at most
`timestamps` groups (video-SALMONN 2+ does so, with 256). Rotary ids: text and sound count on; patches of a group are at
(i, h, w) behind the text, and what follows is one past their largest id.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from omnimem.backbones.base import ChunkInputs
from omnimem.backbones.layout import LayoutEncoder, TokenSpan, patch_ids, patches_per_timestamp
from omnimem.backbones.vision import FramePatches, encode_frames
from omnimem.media import Chunk
from omnimem.modality import AUDIO, VISUAL


class Qwen3VLStreamEncoder(LayoutEncoder):
    """Encoder of one stream; see `Backbone.stream_encoder` for the other parameters.

    Parameters
    ----------
    timestamps : int or None
        Groups that a stream of `duration` seconds has at most; None, or an unknown duration: one a temporal patch.
    """

    def __init__(self, backbone: Any, **asked: Any) -> None:
        super().__init__(backbone, **asked)
        audio_encoder = backbone.audio_encoder()
        self.audio_encoder = audio_encoder if self.has_audio else None
        self.audio_tokens_per_second = 1.0 if audio_encoder is None else audio_encoder.tokens_per_second
        self.limits = backbone.pixel_limits(self.max_pixels)
        self.frames_per_patch = backbone.temporal_patch
        frames = None if self.duration is None else math.ceil(self.duration * self.fps)
        patches = None if frames is None else math.ceil(frames / self.frames_per_patch)
        self.patches_per_group = patches_per_timestamp(patches, self.timestamps)
        self.pending_audio = backbone.embed(torch.zeros(1, 0, dtype=torch.int64))[0]  # sound of the group that is open
        self.audio_seen = 0
        self.patches_seen = 0
        self.in_group: int | None = None  # patches of the group that is open
        self.group_start = 0

    def prefix(self) -> ChunkInputs:
        """System and user turn; a stream without picture begins here."""
        pieces = [self.text(self.backbone.text_ids(self.backbone.opening))]
        if not self.has_video:
            pieces.append(self._mark(self.backbone.vision_start))
        return self.join(pieces)

    def closing(self) -> ChunkInputs:
        """Sound of the group that is open and was not yet due, and its end."""
        pieces, position = [], int(self.next_position_id)
        if self.has_video and self.in_group is None:
            return self.join(pieces)
        numbers = torch.arange(len(self.pending_audio)) + position
        pieces.append(TokenSpan(self.pending_audio, numbers.expand(3, -1), AUDIO, numbers * torch.nan))
        position += len(self.pending_audio)
        pieces.append(self.text(torch.tensor([[self.backbone.vision_end]]), [position]))
        return self.join(pieces, position + 1)

    @property
    def has_pending_input(self) -> bool:
        """Sound of a group that is open."""
        return len(self.pending_audio) > 0

    def encode(self, chunk: Chunk) -> ChunkInputs:
        """Encode a chunk that starts where the last one ended.

        Parameters
        ----------
        chunk : Chunk
            Frames uint8 ``[T, H, W, 3]`` and 16 kHz sound of ``[t0, t1)``.

        Returns
        -------
        ChunkInputs
            One row. A group may go on in the next chunk; its sound comes behind its last patch.

        Raises
        ------
        OmniMemError
            The chunk does not begin at a boundary of the encoders.
        """
        self.check_start(chunk)
        pieces: list[TokenSpan] = []
        if self.audio_encoder is not None and chunk.audio is not None:
            self.pending_audio = torch.cat((self.pending_audio, self.audio_encoder(chunk)))
        if self.has_video and len(chunk.frames):
            patches = encode_frames(self.backbone, chunk.frames, self.limits)
            for i in range(len(patches)):
                first = i * self.frames_per_patch
                last = min(first + self.frames_per_patch, len(chunk.frames)) - 1
                if self.patches_seen % self.patches_per_group == 0:
                    pieces += self._next_group(float(chunk.frame_times[first] + chunk.frame_times[last]) / 2)
                pieces.append(self._patch(patches, i))
                if self.in_group == self.patches_per_group:
                    until = int(self.patches_seen * self.frames_per_patch / self.fps * self.audio_tokens_per_second)
                    pieces.append(self._sound(until - self.audio_seen))
        # Where the picture has ended there is no other patch that the sound could wait for.
        expected = round((chunk.t1 - chunk.t0) * self.fps) if self.has_video else 0
        if chunk.last or len(chunk.frames) < expected or not self.has_video:
            pieces.append(self._sound(len(self.pending_audio)))
        return self.join([piece for piece in pieces if len(piece)])

    def _next_group(self, seconds: float) -> list[TokenSpan]:
        """End of the group before, if there is one, time and beginning of the next."""
        end = [] if self.in_group is None else [self._mark(self.backbone.vision_end)]
        time = self.text(self.backbone.text_ids(f"<{seconds:.1f} seconds>"))
        start = self._mark(self.backbone.vision_start)
        self.in_group, self.group_start = 0, int(self.next_position_id)
        return [*end, time, start]

    def _patch(self, patches: FramePatches, i: int) -> TokenSpan:
        assert self.in_group is not None
        ids = patch_ids(torch.tensor([self.in_group]), patches.height, patches.width) + self.group_start
        seconds = torch.tensor(self.patches_seen * self.frames_per_patch / self.fps)
        self.in_group += 1
        self.patches_seen += 1
        self.next_position_id = self.group_start + max(self.in_group, patches.height, patches.width)
        deepstack = None if patches.deepstack is None else patches.deepstack[:, i]
        return TokenSpan(patches.embeds[i], ids, VISUAL, seconds.expand(ids.shape[1]).float(), deepstack)

    def _sound(self, count: int) -> TokenSpan:
        """The next `count` positions that wait, or as many as there are, counted like text."""
        count = min(max(0, count), len(self.pending_audio))
        embeds, self.pending_audio = self.pending_audio[:count], self.pending_audio[count:]
        numbers = torch.arange(self.audio_seen, self.audio_seen + count)
        self.audio_seen += count
        ids = torch.arange(count) + int(self.next_position_id)
        self.next_position_id += count
        return TokenSpan(embeds, ids.expand(3, -1), AUDIO, numbers / self.audio_tokens_per_second)

    def _mark(self, token: int) -> TokenSpan:
        return self.text(torch.tensor([[token]]))

"""Stream encoder of Qwen3-VL, and of video-SALMONN 2+ 4B/8B, which adds audio to it: groups of timestamped patches.

``<12.5 seconds><|vision_start|>[patches of the group][their audio]<|vision_end|>``, repeated. In training a group is
one temporal patch. Text is never evicted, so in long streams a group holds more patches, such that there are at most
`timestamps` groups (recipes: 256 by default). Position ids: text and audio count up; patch i of a group has
(start + i, start + h, start + w), and the next token continues after the largest of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from omnimem.backbones.chunk_inputs import ChunkInputs
from omnimem.backbones.layout import LayoutEncoder, TokenSpan, patch_position_ids, patches_per_timestamp
from omnimem.backbones.qwen import TransformersBackbone
from omnimem.backbones.vision import FramePatches, encode_frames
from omnimem.media import Chunk
from omnimem.modality import AUDIO, VISUAL


class Qwen3VLStreamEncoder(LayoutEncoder):
    """Encoder of one stream; see `Backbone.stream_encoder` for the other parameters.

    Parameters
    ----------
    timestamps : int or None
        Maximum number of groups of a stream of `duration` seconds; None, or an unknown duration: one group per temporal
        patch.
    """

    backbone: TransformersBackbone

    def __init__(self, backbone: TransformersBackbone, **options: Any) -> None:
        super().__init__(backbone, **options)
        audio_encoder = backbone.audio_encoder()
        self.audio_encoder = audio_encoder if self.has_audio else None
        self.audio_tokens_per_second = 1.0 if audio_encoder is None else audio_encoder.tokens_per_second
        self.limits = backbone.pixel_limits(self.max_pixels)
        self.frames_per_patch = backbone.temporal_patch
        frames = None if self.duration is None else math.ceil(self.duration * self.fps)
        patches = None if frames is None else math.ceil(frames / self.frames_per_patch)
        self.patches_per_group = patches_per_timestamp(patches, self.timestamps)
        self.pending_audio = backbone.embed(torch.zeros(1, 0, dtype=torch.int64))[0]  # audio tokens of the open group
        self.audio_seen = 0
        self.patches_seen = 0
        self.in_group: int | None = None  # patches in the open group; None before the first group
        self.group_start = 0

    def prefix(self) -> ChunkInputs:
        """System prompt and start of the user turn; without video also ``<|vision_start|>``."""
        spans = [self.text(self.backbone.text_ids(self.backbone.prompt_prefix))]
        if not self.has_video:
            spans.append(self._token(self.backbone.vision_start))
        return self.join(spans)

    def closing(self) -> ChunkInputs:
        """Pending audio of the open group and ``<|vision_end|>``."""
        spans, position_id = [], int(self.next_position_id)
        if self.has_video and self.in_group is None:
            return self.join(spans)
        ids = torch.arange(len(self.pending_audio)) + position_id
        time = torch.full((len(self.pending_audio),), torch.nan)  # as for all closing tokens
        spans.append(TokenSpan(self.pending_audio, ids.expand(3, -1), AUDIO, time))
        position_id += len(self.pending_audio)
        spans.append(self.text(torch.tensor([[self.backbone.vision_end]]), [position_id]))
        return self.join(spans, position_id + 1)

    @property
    def has_pending_input(self) -> bool:
        """Whether audio of the open group is buffered."""
        return len(self.pending_audio) > 0

    def encode(self, chunk: Chunk) -> ChunkInputs:
        """Encode the next chunk.

        Parameters
        ----------
        chunk : Chunk
            Frames uint8 ``[T, H, W, 3]`` and 16 kHz audio of ``[t0, t1)`` seconds.

        Returns
        -------
        ChunkInputs
            Batch size 1. A group may continue in the next chunk; its audio follows its last patch.

        Raises
        ------
        OmniMemError
            The chunk does not start at a multiple of the chunk alignment.
        """
        self.check_start(chunk)
        spans: list[TokenSpan] = []
        if self.audio_encoder is not None and chunk.audio is not None:
            self.pending_audio = torch.cat((self.pending_audio, self.audio_encoder(chunk)))
        if self.has_video and len(chunk.frames):
            patches = encode_frames(self.backbone, chunk.frames, self.limits)
            for i in range(len(patches)):
                first = i * self.frames_per_patch
                last = min(first + self.frames_per_patch, len(chunk.frames)) - 1
                if self.patches_seen % self.patches_per_group == 0:
                    spans += self._next_group(float(chunk.frame_times[first] + chunk.frame_times[last]) / 2)
                spans.append(self._patch_span(patches, i))
                if self.in_group == self.patches_per_group:
                    until = int(self.patches_seen * self.frames_per_patch / self.fps * self.audio_tokens_per_second)
                    spans.append(self._audio_span(until - self.audio_seen))
        # After the end of the video no patch will complete the group: emit all buffered audio.
        expected = round((chunk.t1 - chunk.t0) * self.fps) if self.has_video else 0
        if chunk.last or len(chunk.frames) < expected or not self.has_video:
            spans.append(self._audio_span(len(self.pending_audio)))
        return self.join([span for span in spans if len(span)])

    def _next_group(self, seconds: float) -> list[TokenSpan]:
        """End token of the previous group, if there is one, then timestamp and start token of the next group."""
        end = [] if self.in_group is None else [self._token(self.backbone.vision_end)]
        time = self.text(self.backbone.text_ids(f"<{seconds:.1f} seconds>"))
        start = self._token(self.backbone.vision_start)
        self.in_group, self.group_start = 0, int(self.next_position_id)
        return [*end, time, start]

    def _patch_span(self, patches: FramePatches, i: int) -> TokenSpan:
        """Tokens of temporal patch `i` of the chunk."""
        assert self.in_group is not None
        ids = patch_position_ids(torch.tensor([self.in_group]), patches.height, patches.width) + self.group_start
        seconds = torch.tensor(self.patches_seen * self.frames_per_patch / self.fps)
        self.in_group += 1
        self.patches_seen += 1
        self.next_position_id = self.group_start + max(self.in_group, patches.height, patches.width)
        deepstack = None if patches.deepstack is None else patches.deepstack[:, i]
        return TokenSpan(patches.embeds[i], ids, VISUAL, seconds.expand(ids.shape[1]).float(), deepstack)

    def _audio_span(self, count: int) -> TokenSpan:
        """The next `count` pending audio tokens, or all if there are fewer; their position ids count up like text."""
        count = min(max(0, count), len(self.pending_audio))
        embeds, self.pending_audio = self.pending_audio[:count], self.pending_audio[count:]
        numbers = torch.arange(self.audio_seen, self.audio_seen + count)
        self.audio_seen += count
        ids = torch.arange(count) + int(self.next_position_id)
        self.next_position_id += count
        return TokenSpan(embeds, ids.expand(3, -1), AUDIO, numbers / self.audio_tokens_per_second)

    def _token(self, token: int) -> TokenSpan:
        """Span of one text token."""
        return self.text(torch.tensor([[token]]))

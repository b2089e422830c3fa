"""Stream encoder of Qwen2.5-VL, and of video-SALMONN 2+ 3B/7B/72B, which adds audio to it.

``<|vision_start|>[patch][its audio][patch][its audio]…[remaining audio]<|vision_end|>``; Qwen2.5-VL has the patches
only. Position ids of a temporal patch: (start + ⌊t·tokens_per_second⌋, start + h, start + w).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from omnimem.backbones.chunk_inputs import ChunkInputs
from omnimem.backbones.layout import LayoutEncoder, TokenSpan, patch_position_ids
from omnimem.backbones.qwen import TransformersBackbone
from omnimem.backbones.vision import FramePatches, encode_frames
from omnimem.errors import OmniMemError
from omnimem.media import Chunk
from omnimem.modality import AUDIO, VISUAL


class Qwen2_5VLStreamEncoder(LayoutEncoder):
    """Encoder of one stream; see `Backbone.stream_encoder` for the other parameters.

    Parameters
    ----------
    position_layout : {"train", "release"}
        Position ids of a stream with video and audio. ``train``, as in training: audio (start + i, start, start + i),
        text continues after the largest time id. ``release``, as in the released inference code, which ignores that
        some tokens are audio: the first tokens get the ids of all patches in order, the remaining tokens count up like
        text. This needs a known duration that equals the duration of the video.
    """

    backbone: TransformersBackbone

    def __init__(self, backbone: TransformersBackbone, **options: Any) -> None:
        super().__init__(backbone, **options)
        audio_encoder = backbone.audio_encoder()
        self.audio_encoder = audio_encoder if self.has_audio else None
        self.audio_tokens_per_second = 1.0 if audio_encoder is None else audio_encoder.tokens_per_second
        self.limits = backbone.pixel_limits(self.max_pixels)
        self.prompt_prefix_ids = backbone.text_ids(backbone.prompt_prefix)
        per_second = float(backbone.config.vision_config.tokens_per_second)
        self.time_scale = self.choose_time_scale(per_second, self.prompt_prefix_ids.shape[1])
        # Same dtype (float32) and order of operations as in the models.
        self.seconds_per_patch = torch.tensor(backbone.temporal_patch / self.fps)
        self.ids_per_patch = self.seconds_per_patch * (per_second * self.time_scale)
        self.expected_patches: int | None = None  # of the whole stream; only for position_layout=release
        if self.position_layout == "release" and self.has_video and self.has_audio:
            if self.duration is None:
                raise OmniMemError(
                    "position_layout=release needs a duration, which the header of this file does not state"
                )
            self.expected_patches = -(-math.ceil(self.duration * self.fps) // backbone.temporal_patch)
        self.pending_audio = torch.empty(0, backbone.config.get_text_config().hidden_size)
        self.start = self.largest_id = 0
        self.patches_seen = self.audio_seen = self.media_tokens_seen = 0
        self.patch_size = (0, 0)  # tokens per patch: height, width

    def prefix(self) -> ChunkInputs:
        """System prompt, start of the user turn, and ``<|vision_start|>``."""
        prompt = self.text(torch.cat((self.prompt_prefix_ids, torch.tensor([[self.backbone.vision_start]])), dim=1))
        self.start = int(self.next_position_id)
        self.largest_id = self.start - 1
        return self.join([prompt])

    def closing(self) -> ChunkInputs:
        """``<|vision_end|>``."""
        end = self.text(torch.tensor([[self.backbone.vision_end]]), [self.next_position_id])
        return self.join([end], self.next_position_id + 1)

    def encode(self, chunk: Chunk) -> ChunkInputs:
        """Encode the next chunk.

        Parameters
        ----------
        chunk : Chunk
            Frames uint8 ``[T, H, W, 3]`` and 16 kHz audio of ``[t0, t1)`` seconds.

        Returns
        -------
        ChunkInputs
            Batch size 1: every temporal patch, followed by the audio of its time.

        Raises
        ------
        OmniMemError
            The chunk does not start at a multiple of the chunk alignment.
        """
        self.check_start(chunk)
        spans = []
        if self.audio_encoder is not None and chunk.audio is not None:
            self.pending_audio = self.audio_encoder(chunk)
        if self.has_video and len(chunk.frames):
            patches = encode_frames(self.backbone, chunk.frames, self.limits)
            for i in range(len(patches)):
                spans.append(self._patch_span(patches, i))
                until = int(self.patches_seen * self.seconds_per_patch * self.audio_tokens_per_second)
                spans.append(self._audio_span(until - self.audio_seen))
        # Remaining audio: the audio is longer than the video, or padding of the audio encoder.
        spans.append(self._audio_span(len(self.pending_audio)))
        spans = [span for span in spans if len(span)]
        if spans:
            self.next_position_id = self.largest_id + 1
        return self.join(spans)

    def _patch_span(self, patches: FramePatches, i: int) -> TokenSpan:
        """Tokens of temporal patch `i` of the chunk."""
        number, self.patches_seen = self.patches_seen, self.patches_seen + 1
        seconds = (number * self.seconds_per_patch).float()
        count = patches.height * patches.width
        if self.expected_patches is not None:
            self.patch_size = (patches.height, patches.width)
            ids = self._release_ids(count)
        else:
            index = torch.tensor([number])
            ids = patch_position_ids(index, patches.height, patches.width, self.ids_per_patch) + self.start
            # Text continues after the largest time id with audio, after the largest id of all axes without.
            self.largest_id = max(self.largest_id, int((ids[0] if self.has_audio else ids).max()))
        deepstack = None if patches.deepstack is None else patches.deepstack[:, i]
        return TokenSpan(patches.embeds[i], ids, VISUAL, seconds.expand(count), deepstack)

    def _audio_span(self, count: int) -> TokenSpan:
        """The next `count` pending audio tokens, or all if there are fewer."""
        count = min(max(0, count), len(self.pending_audio))
        embeds, self.pending_audio = self.pending_audio[:count], self.pending_audio[count:]
        numbers = torch.arange(self.audio_seen, self.audio_seen + count)
        self.audio_seen += count
        if self.expected_patches is not None:
            ids = self._release_ids(count)
        else:
            time = (numbers * self.time_scale).long()
            # Without video, audio has text-like ids: the same on all axes.
            ids = torch.stack((time, torch.zeros_like(time) if self.has_video else time, time)) + self.start
            self.largest_id = max([self.largest_id, *ids[0].tolist()])
        return TokenSpan(embeds, ids, AUDIO, numbers / self.audio_tokens_per_second)

    def _release_ids(self, count: int) -> Tensor:
        """Position ids ``[3, count]`` of the next tokens in the release layout, whatever their modality."""
        assert self.expected_patches is not None
        height, width = self.patch_size
        patch = height * width
        patch_tokens = self.expected_patches * patch  # tokens that get ids of patches
        numbers = torch.arange(self.media_tokens_seen, self.media_tokens_seen + count)
        self.media_tokens_seen += count
        # Compute the ids of the needed patches only: a long stream has many.
        first = min(self.media_tokens_seen - count, patch_tokens) // patch
        stop = min(-(-self.media_tokens_seen // patch), self.expected_patches)
        visual = patch_position_ids(torch.arange(first, stop), height, width, self.ids_per_patch)
        visual = visual[:, numbers[numbers < patch_tokens] - first * patch]
        largest = max(int((self.expected_patches - 1) * self.ids_per_patch), height - 1, width - 1)
        text = numbers[numbers >= patch_tokens] - patch_tokens + largest + 1
        ids = torch.cat((visual, text.expand(3, -1)), dim=1) + self.start
        self.largest_id = max([self.largest_id, *ids.flatten().tolist()])
        return ids

"""Picture and sound of a stream as Qwen2.5-Omni positions, chunk by chunk.

The layout is the processor's, ``<|vision_bos|><|audio_bos|>[2 s video][2 s sound]…<|audio_eos|><|vision_eos|>``,
and the rotary ids are TMRoPE's, equal to the model's own `get_rope_index` on the whole clip: video
(start + ⌊t·25⌋, start + h, start + w), sound start + i on all three rows, each opening and closing pair on one
position. Encoders run on the chunk alone and are exact there: the vision tower never looks beyond a temporal patch,
the audio tower never beyond 2 s.
"""

from __future__ import annotations

from copy import copy
from math import floor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from omnimem.backbones.base import ChunkInputs
from omnimem.backbones.layout import LayoutEncoder, TokenSpan, patch_ids
from omnimem.backbones.mel import MelStream
from omnimem.backbones.vision import encode_frames
from omnimem.media import Chunk
from omnimem.modality import AUDIO, VISUAL

if TYPE_CHECKING:
    from omnimem.backbones.qwen2_5_omni.backbone import Qwen2_5Omni

AUDIO_TOKENS_PER_SECOND = 25
"""Positions a second of sound becomes: 100 mel frames, halved twice by the audio tower."""


class Qwen2_5OmniStreamEncoder(LayoutEncoder):
    """Encoder of one stream; see `Backbone.stream_encoder` for what is not listed.

    Parameters
    ----------
    mel_floor : float or "running"
        See `MelStream`.
    """

    def __init__(self, backbone: Qwen2_5Omni, *, mel_floor: float | str = "running", **asked: Any) -> None:
        super().__init__(backbone, **asked)
        config = backbone.config
        self.group_seconds = float(config.seconds_per_chunk)
        self.seconds_per_patch = torch.tensor(backbone.temporal_patch / self.fps)
        self.limits = backbone.pixel_limits(self.max_pixels)
        self.mel = MelStream(backbone.processor.feature_extractor, 2 * config.audio_config.n_window, mel_floor)
        self.opening_ids = backbone.text_ids(backbone.opening)
        per_second = config.position_id_per_seconds
        self.time_scale = self.choose_time_scale(per_second, self.opening_ids.shape[1])
        self.ids_per_second = per_second * self.time_scale
        self.patches_seen = 0
        self.audio_seen = 0
        self.start = 0

    def prefix(self) -> ChunkInputs:
        """System and user turn, then the opening token(s) of the media, which share one position."""
        names = (["vision_bos"] if self.has_video else []) + (["audio_bos"] if self.has_audio else [])
        opening = self.text(self.opening_ids)
        marks = self.text(self._ids(names), [self.next_position_id] * len(names))
        self.start = self.next_position_id = int(self.next_position_id) + 1
        return self.join([opening, marks])

    def closing(self) -> ChunkInputs:
        """The closing token(s) of the media on one position."""
        names = (["audio_eos"] if self.has_audio else []) + (["vision_eos"] if self.has_video else [])
        marks = self.text(self._ids(names), [self.next_position_id] * len(names))
        return self.join([marks], self.next_position_id + 1)

    def fork(self) -> Qwen2_5OmniStreamEncoder:
        """Another encoder at the same place of the stream; the loudest sound so far is part of the place."""
        other = copy(self)
        other.mel = copy(self.mel)
        return other

    def encode(self, chunk: Chunk) -> ChunkInputs:
        """Encode a chunk that starts where the last one ended.

        Parameters
        ----------
        chunk : Chunk
            Frames uint8 ``[T, H, W, 3]`` and 16 kHz sound of ``[t0, t1)``.

        Returns
        -------
        ChunkInputs
            One row: for each 2 s its video positions, then its sound positions.

        Raises
        ------
        OmniMemError
            The chunk does not begin at a block boundary of the encoders.
        """
        self.check_start(chunk)
        video = self._video(chunk) if self.has_video and len(chunk.frames) else []
        audio = self._audio(chunk) if self.has_audio and chunk.audio is not None else []
        groups = sorted({group for group, _ in (*video, *audio)})
        ordered = [piece for group in groups for pieces in (video, audio) for at, piece in pieces if at == group]
        if ordered:
            # The model's rule: text goes on one past the largest id of the *last* piece.
            self.next_position_id = int(ordered[-1].position_ids.max()) + 1
        return self.join(ordered)

    def _video(self, chunk: Chunk) -> list[tuple[int, TokenSpan]]:
        """Video positions of the chunk, one piece a temporal patch, with the number of its 2 s."""
        patches = encode_frames(self.backbone, chunk.frames, self.limits)
        numbers = torch.arange(self.patches_seen, self.patches_seen + len(patches))
        self.patches_seen += len(patches)
        seconds = numbers * self.seconds_per_patch
        # In float32 and this order, as the model computes it.
        time = (seconds * self.ids_per_second).long()
        pieces = []
        for i, embeds in enumerate(patches.embeds):
            ids = patch_ids(time[i : i + 1], patches.height, patches.width) + self.start
            group = floor(seconds[i].item() / self.group_seconds + 1e-6)
            pieces.append((group, TokenSpan(embeds, ids, VISUAL, seconds[i].expand(len(embeds)).float())))
        return pieces

    def _audio(self, chunk: Chunk) -> list[tuple[int, TokenSpan]]:
        """Sound positions of the chunk, one piece for each 2 s, with their number."""
        mel = self.mel.frames(chunk)
        tokens = _audio_tokens(mel.shape[1])
        if tokens == 0:
            return []
        tower = self.backbone.model.model.audio_tower
        lengths = torch.tensor([mel.shape[1]], device=self.backbone.device)
        features = tower(
            mel.to(self.backbone.device, tower.dtype), feature_lens=lengths, aftercnn_lens=(lengths - 1) // 2 + 1
        ).last_hidden_state
        numbers = torch.arange(self.audio_seen, self.audio_seen + tokens)
        self.audio_seen += tokens
        ids = (self.start + (numbers * self.time_scale).long()).expand(3, -1)
        seconds = numbers / AUDIO_TOKENS_PER_SECOND
        size = round(self.group_seconds * AUDIO_TOKENS_PER_SECOND)
        return [
            (
                int(numbers[i]) // size,
                TokenSpan(features[i : i + size], ids[:, i : i + size], AUDIO, seconds[i : i + size]),
            )
            for i in range(0, tokens, size)
        ]

    def _ids(self, names: list[str]) -> Tensor:
        tokenizer = self.backbone.tokenizer
        return torch.tensor([[self.backbone.token_id(getattr(tokenizer, f"{name}_token")) for name in names]])


def _audio_tokens(frames: int) -> int:
    """Sound positions of so many mel frames: two strided stages in the tower."""
    return max(0, ((frames - 1) // 2 + 1 - 2) // 2 + 1) if frames else 0

"""Picture and sound of a stream as Qwen3-Omni positions, chunk by chunk.

The layout is the processor's, ``<|vision_start|><|audio_start|>…<|audio_end|><|vision_end|>`` with picture and sound
merged by time: a temporal patch stands before the first sound position that is not earlier. The rotary ids are equal to
the model's own `get_rope_index` on the whole clip, float32 and 13 a second: video (start + t·13, start + h, start + w),
sound start + i on all three rows; unlike in Qwen2.5-Omni every opening and closing token has a position of its own.

Encoders run on the chunk alone and are exact there: the vision tower never looks beyond a temporal patch, the audio
tower never beyond a window of its attention, which is 8 s. Where such windows end a whole number of ids has passed, and
so have a whole number of temporal patches; so what a chunk brings never belongs before what an earlier one brought.
"""

from __future__ import annotations

from copy import copy
from math import ceil
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
    from omnimem.backbones.qwen3_omni.backbone import Qwen3Omni

TOKENS_PER_MEL_BLOCK = 13
"""Positions that the audio tower makes of each full block of 100 mel frames: halved three times, rounded up."""


class Qwen3OmniStreamEncoder(LayoutEncoder):
    """Encoder of one stream; see `Backbone.stream_encoder` for what is not listed.

    Parameters
    ----------
    mel_floor : float or "running"
        See `MelStream`.
    """

    id_dtype = torch.float32

    def __init__(self, backbone: Qwen3Omni, *, mel_floor: float | str = "running", **asked: Any) -> None:
        super().__init__(backbone, **asked)
        config = backbone.config
        self.seconds_per_patch = backbone.temporal_patch / self.fps
        self.limits = backbone.pixel_limits(self.max_pixels)
        self.mel_block_frames = 2 * config.audio_config.n_window
        self.mel = MelStream(
            backbone.processor.feature_extractor, backbone.mel_window_frames, mel_floor, reflect_end=True
        )
        self.opening_ids = backbone.text_ids(backbone.opening)
        self.ids_per_second: int = config.position_id_per_seconds
        self.time_scale = self.choose_time_scale(self.ids_per_second, self.opening_ids.shape[1])
        self.patches_seen = 0
        self.audio_seen = 0
        self.start = 0

    def prefix(self) -> ChunkInputs:
        """System and user turn, then the opening token(s) of the media."""
        names = (["vision_bos"] if self.has_video else []) + (["audio_bos"] if self.has_audio else [])
        inputs = self.join([self.text(self.opening_ids), self.text(self._ids(names))])
        self.start = int(self.next_position_id)
        return inputs

    def closing(self) -> ChunkInputs:
        """The closing token(s) of the media."""
        names = (["audio_eos"] if self.has_audio else []) + (["vision_eos"] if self.has_video else [])
        positions = _consecutive(self.next_position_id, len(names) + 1)
        return self.join([self.text(self._ids(names), positions[:-1])], positions[-1])

    def fork(self) -> Qwen3OmniStreamEncoder:
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
            One row: video and sound positions in the order of their time ids, video first where they are equal.

        Raises
        ------
        OmniMemError
            The chunk does not begin at a boundary of the encoders.
        """
        self.check_start(chunk)
        first = self.audio_seen
        features = self._audio(chunk) if self.has_audio and chunk.audio is not None else None
        pieces, taken = [], first
        for due, patch in self._video(chunk) if self.has_video and len(chunk.frames) else []:
            if features is not None:
                until = min(max(ceil(due), taken), self.audio_seen)
                pieces.append(self._sound(features, first, taken, until))
                taken = until
            pieces.append(patch)
        if features is not None:
            pieces.append(self._sound(features, first, taken, self.audio_seen))
        pieces = [piece for piece in pieces if len(piece)]
        if pieces:
            # The model's rule: text goes on one past the largest id of the *last* piece.
            self.next_position_id = _consecutive(pieces[-1].position_ids.max().item(), 2)[1]
        return self.join(pieces)

    def _video(self, chunk: Chunk) -> list[tuple[float, TokenSpan]]:
        """Temporal patches of the chunk, each with the number of the sound position that it stands before."""
        patches = encode_frames(self.backbone, chunk.frames, self.limits)
        numbers = torch.arange(self.patches_seen, self.patches_seen + len(patches))
        self.patches_seen += len(patches)
        seconds = numbers * torch.tensor(self.seconds_per_patch)
        # In float32 and this order, as the model computes it; the order among the sound in double precision, as the
        # processor does.
        time = seconds * self.ids_per_second * self.time_scale
        grid = patch_ids(torch.zeros(1, dtype=torch.int64), patches.height, patches.width).to(self.id_dtype)
        pieces = []
        for i, number in enumerate(numbers.tolist()):
            ids = grid.clone()
            ids[0] += time[i]
            deepstack = None if patches.deepstack is None else patches.deepstack[:, i]
            piece = TokenSpan(patches.embeds[i], ids + self.start, VISUAL, seconds[i].expand(ids.shape[1]), deepstack)
            pieces.append((number * self.seconds_per_patch * self.ids_per_second, piece))
        return pieces

    def _audio(self, chunk: Chunk) -> Tensor:
        """Sound of the chunk as ``[N, C]``; they are counted as seen."""
        mel = self.mel.frames(chunk)
        frames = mel.shape[1]
        count = audio_tokens(frames, self.mel_block_frames)
        tower = self.backbone.model.model.audio_tower
        if count == 0:
            return torch.empty(0, tower.config.output_dim, device=self.backbone.device)
        lengths = [frames]
        if frames < self.mel_block_frames and self.audio_seen > 0:
            # The tower pads its blocks to the longest one, and its convolutions see the padding: where the sound of the
            # whole clip has a full block, the last one must find one beside it here too.
            mel = torch.cat((mel.new_zeros(len(mel), self.mel_block_frames), mel), dim=1)
            lengths = [self.mel_block_frames, frames]
        features = tower(
            mel.to(self.backbone.device, tower.dtype), feature_lens=torch.tensor(lengths, device=self.backbone.device)
        ).last_hidden_state[-count:]
        self.audio_seen += count
        return features

    def _sound(self, features: Tensor, first: int, start: int, stop: int) -> TokenSpan:
        """Sound positions `start` to `stop` of the stream, of `features` that begin at position `first`."""
        numbers = torch.arange(start, stop)
        ids = (self.start + numbers * self.time_scale).to(self.id_dtype)
        return TokenSpan(
            features[start - first : stop - first], ids.expand(3, -1), AUDIO, numbers / TOKENS_PER_MEL_BLOCK
        )

    def _ids(self, names: list[str]) -> Tensor:
        tokenizer = self.backbone.tokenizer
        return torch.tensor([[self.backbone.token_id(getattr(tokenizer, f"{name}_token")) for name in names]])


def audio_tokens(frames: int, block: int) -> int:
    """Positions of so many mel frames, cut into blocks: three convolutions halve each, rounding up."""
    rest = frames % block
    for _ in range(3):
        rest = (rest + 1) // 2
    return frames // block * TOKENS_PER_MEL_BLOCK + rest


def _consecutive(start: float, count: int) -> list[float]:
    """Ids that count up from a fractional one, rounded to float32 as the model's are."""
    return (torch.arange(count) + torch.tensor(start, dtype=torch.float32)).tolist()

"""Picture and sound of a stream as Qwen2.5-Omni positions, chunk by chunk.

The layout is the processor's, ``<|vision_bos|><|audio_bos|>[2 s video][2 s sound]…<|audio_eos|><|vision_eos|>``,
and the rotary ids are TMRoPE's, equal to the model's own `get_rope_index` on the whole clip: video
(start + ⌊t·25⌋, start + h, start + w), sound start + i on all three rows, each opening and closing pair on one
position. Encoders run on the chunk alone and are exact there: the vision tower never looks beyond a temporal patch,
the audio tower never beyond 2 s.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import copy
from fractions import Fraction
from math import floor, lcm
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omnimem.backbones.base import ChunkInputs, StreamEncoder
from omnimem.backbones.qwen2_5_omni.mel import SAMPLE_RATE, MelStream
from omnimem.backbones.qwen2_5_omni.prompt import opening
from omnimem.errors import OmniMemError
from omnimem.media import Chunk
from omnimem.modality import AUDIO, VISUAL

if TYPE_CHECKING:
    from omnimem.backbones.qwen2_5_omni.backbone import Qwen2_5Omni

logger = logging.getLogger("omnimem.backbones")

AUDIO_TOKENS_PER_SECOND = 25
"""Positions a second of sound becomes: 100 mel frames, halved twice by the audio tower."""

TEXT_RESERVE = 1024
"""Rotary ids kept free behind the media for question and answer when a time scale is chosen."""


def chunk_alignment(fps: float, group_seconds: float = 2.0, temporal_patch: int = 2) -> float:
    """Shortest time that holds whole sound blocks and whole temporal patches (2 s at 1, 2, 3… frames a second)."""
    group = Fraction(group_seconds).limit_denominator(1000)
    patch = temporal_patch / Fraction(fps).limit_denominator(1000)
    numerator = lcm(group.numerator * patch.denominator, patch.numerator * group.denominator)
    return float(Fraction(numerator, group.denominator * patch.denominator))


def choose_time_scale(duration: float | None, ids_per_second: float, limit: int, reserve: int) -> float:
    """Largest factor ≤ 1 on ids a second with which `duration` seconds stay inside the trained position range."""
    if duration is None or duration * ids_per_second + reserve <= limit:
        return 1.0
    return (limit - reserve) / (duration * ids_per_second)


class Qwen2_5OmniStreamEncoder(StreamEncoder):
    """Encoder of one stream; see `Backbone.stream_encoder` for the parameters."""

    def __init__(
        self,
        backbone: Qwen2_5Omni,
        *,
        picture: bool,
        sound: bool,
        fps: float,
        duration: float | None,
        time_scale: float | str,
        max_pixels: int | None = None,
        mel_floor: float | str = "running",
    ) -> None:
        if not picture and not sound:
            raise OmniMemError("nothing to stream: the media has neither picture nor sound (or both are switched off)")
        config = backbone.config
        self.backbone = backbone
        self.picture, self.sound = picture, sound
        self.group_seconds = float(config.seconds_per_chunk)
        self.temporal_patch = config.vision_config.temporal_patch_size
        self.merge = config.vision_config.spatial_merge_size
        self.seconds_per_patch = torch.tensor(self.temporal_patch / fps)
        self.frame_limits = backbone.frame_limits(max_pixels)
        self.alignment = chunk_alignment(fps, self.group_seconds, self.temporal_patch)
        self.block_frames = 2 * config.audio_config.n_window
        self.mel = MelStream(backbone.processor.feature_extractor, self.block_frames, mel_floor)
        self.opening_ids = backbone.tokenizer(opening(), return_tensors="pt").input_ids
        self.position_limit = config.text_config.max_position_embeddings
        if time_scale == "auto":
            reserve = TEXT_RESERVE + self.opening_ids.shape[1]
            time_scale = choose_time_scale(duration, config.position_id_per_seconds, self.position_limit, reserve)
            if time_scale < 1:
                logger.info(
                    "%.0f s of media reach past the trained position range (%d ids): using %.3g ids a second "
                    "instead of %d; set time_scale=1 to keep them",
                    duration, self.position_limit, config.position_id_per_seconds * time_scale,
                    config.position_id_per_seconds,
                )  # fmt: skip
        self.time_scale = float(time_scale)
        self.ids_per_second = config.position_id_per_seconds * self.time_scale
        self.patches_seen = 0
        self.audio_seen = 0
        self.next_position = 0
        self.start = 0
        self._warned = False

    def prefix(self) -> ChunkInputs:
        """System and user turn, then the opening token(s) of the media, which share one position."""
        token = self.backbone.token_ids
        names = (["vision_bos"] if self.picture else []) + (["audio_bos"] if self.sound else [])
        text = self.opening_ids.shape[1]
        positions = [*range(text), *[text] * len(names)]
        self.start = self.next_position = text + 1
        ids = torch.cat((self.opening_ids, torch.tensor([[token[name] for name in names]])), dim=1)
        return self._text(ids, positions)

    def closing(self) -> ChunkInputs:
        """The closing token(s) of the media on one position."""
        token = self.backbone.token_ids
        names = (["audio_eos"] if self.sound else []) + (["vision_eos"] if self.picture else [])
        ids = torch.tensor([[token[name] for name in names]])
        return self._text(ids, [self.next_position] * len(names))

    def idle(self) -> ChunkInputs:
        """No positions."""
        return self._text(torch.zeros(1, 0, dtype=torch.int64), [])

    def _text(self, ids: Tensor, positions: Sequence[int]) -> ChunkInputs:
        embeds = self.backbone.embed(ids)
        plain = ChunkInputs.text(embeds, 0)
        rows = torch.tensor(positions, dtype=torch.int64, device=embeds.device).expand(3, 1, -1)
        following = (positions[-1] + 1) if len(positions) else self.next_position
        return ChunkInputs(
            plain.embeds, rows, plain.modality, plain.time, torch.tensor([following], device=embeds.device)
        )

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
        offset = chunk.t0 / self.alignment
        if abs(offset - round(offset)) > 1e-6:
            raise OmniMemError(
                f"a chunk starts at {chunk.t0:g} s; chunk_seconds must be a multiple of {self.alignment:g} s here"
            )
        video = self._video(chunk) if self.picture and len(chunk.frames) else []
        audio = self._audio(chunk) if self.sound and chunk.audio is not None else []
        groups = sorted({piece.group for piece in (*video, *audio)})
        ordered = [piece for group in groups for pieces in (video, audio) for piece in pieces if piece.group == group]
        if not ordered:
            return self.idle()
        device = self.backbone.device
        positions = torch.cat([piece.positions for piece in ordered], dim=1)
        # The model's rule: text goes on one past the largest id of the *last* piece.
        self.next_position = int(ordered[-1].positions.max()) + 1
        self._check_range()
        return ChunkInputs(
            embeds=torch.cat([piece.embeds for piece in ordered])[None].to(self.backbone.language_model.dtype),
            positions=positions[:, None].to(device),
            modality=torch.cat([torch.full_like(p.time, p.kind, dtype=torch.int8) for p in ordered])[None].to(device),
            time=torch.cat([piece.time for piece in ordered])[None].to(device),
            next_position=torch.tensor([self.next_position], device=device),
        )

    def _video(self, chunk: Chunk) -> list[_Piece]:
        """Video positions of the chunk, one piece a temporal patch."""
        frames = torch.from_numpy(chunk.frames).permute(0, 3, 1, 2)
        processed = self.backbone.processor.video_processor(
            videos=[frames],
            do_sample_frames=False,
            cap_pixels_per_frame=False,
            return_tensors="pt",
            size=self.frame_limits,
        )
        grid = processed["video_grid_thw"]
        pixels = processed["pixel_values_videos"].to(self.backbone.device)
        features = self.backbone.model.get_video_features(pixels, grid.to(self.backbone.device))
        patches, height, width = grid[0].tolist()
        height, width = height // self.merge, width // self.merge
        embeds = features.pooler_output[0].view(patches, height * width, -1)
        numbers = torch.arange(self.patches_seen, self.patches_seen + patches)
        self.patches_seen += patches
        # In float32 and this order, as the model computes it.
        time_ids = (numbers * self.seconds_per_patch * self.ids_per_second).long()
        seconds = numbers * self.seconds_per_patch
        grid_ids = torch.stack(
            (
                torch.zeros(height * width, dtype=torch.int64),
                torch.arange(height).repeat_interleave(width),
                torch.arange(width).repeat(height),
            )
        )
        pieces = []
        for i in range(patches):
            ids = grid_ids.clone()
            ids[0] = time_ids[i]
            group = floor(seconds[i].item() / self.group_seconds + 1e-6)
            time = seconds[i].expand(height * width).float()
            pieces.append(_Piece(group, VISUAL, embeds[i], ids + self.start, time))
        return pieces

    def _audio(self, chunk: Chunk) -> list[_Piece]:
        """Sound positions of the chunk, one piece for each 2 s."""
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
            _Piece(int(numbers[i]) // size, AUDIO, features[i : i + size], ids[:, i : i + size], seconds[i : i + size])
            for i in range(0, tokens, size)
        ]

    def _check_range(self) -> None:
        if self.next_position > self.position_limit and not self._warned:
            self._warned = True
            logger.warning(
                "positions passed the trained range of %d ids; answers may degrade (give time_scale a value below 1)",
                self.position_limit,
            )


def _audio_tokens(frames: int) -> int:
    """Sound positions of so many mel frames: two strided stages in the tower."""
    return max(0, ((frames - 1) // 2 + 1 - 2) // 2 + 1) if frames else 0


class _Piece:
    """Positions of one modality that stay together: a temporal patch, or the sound of one group."""

    def __init__(self, group: int, kind: int, embeds: Tensor, positions: Tensor, time: Tensor) -> None:
        self.group, self.kind, self.embeds, self.positions, self.time = group, kind, embeds, positions, time


__all__ = ["SAMPLE_RATE", "Qwen2_5OmniStreamEncoder", "choose_time_scale", "chunk_alignment"]

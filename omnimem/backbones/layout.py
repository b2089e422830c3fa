"""How a stream is laid out: pieces of text, picture and sound in the order and at the positions a model was trained on.

A backbone's stream encoder says which pieces follow each other; what all of them share is here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from math import gcd, lcm
from typing import Any

import torch
from torch import Tensor

from omnimem.backbones.base import ChunkInputs, StreamEncoder
from omnimem.errors import OmniMemError
from omnimem.media import Chunk
from omnimem.modality import TEXT

logger = logging.getLogger("omnimem.backbones")

TEXT_RESERVE = 1024
"""Rotary ids kept free behind the media for question and answer when a time scale is chosen."""


@dataclass(frozen=True)
class TokenSpan:
    """Positions of one modality that stand together, such as a temporal patch.

    Attributes
    ----------
    embeds : Tensor
        ``[N, C]``.
    positions : Tensor
        ``[3, N]`` rotary ids.
    kind : int
        See `omnimem.modality`.
    time : Tensor
        float32 ``[N]`` seconds into the media; NaN for text.
    deepstack : Tensor or None
        ``[L, N, C]``, see `ChunkInputs`.
    """

    embeds: Tensor
    position_ids: Tensor
    modality: int
    time: Tensor
    deepstack: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)


class LayoutEncoder(StreamEncoder):
    """A stream encoder that puts pieces one behind the other.

    Parameters
    ----------
    backbone : Backbone
        The model.
    picture, sound, fps, duration, time_scale, max_pixels, position_layout, timestamps
        See `Backbone.stream_encoder`; a layout takes no notice of what it does not have.

    Raises
    ------
    OmniMemError
        Neither picture nor sound, or sound alone for a model that does not hear.
    """

    id_dtype = torch.int64
    """Of rotary ids."""

    def __init__(
        self,
        backbone: Any,
        *,
        video: bool,
        audio: bool,
        fps: float,
        duration: float | None = None,
        time_scale: float | str = "auto",
        max_pixels: int | None = None,
        position_layout: str = "train",
        timestamps: int | None = None,
    ) -> None:
        if not video and not audio:
            raise OmniMemError("nothing to stream: the media has neither video nor audio (or both are switched off)")
        if not video and not backbone.supports_audio:
            raise OmniMemError(f"nothing to stream: {backbone.name} does not support audio, and the media has no video")
        audio = audio and backbone.supports_audio
        self.backbone = backbone
        self.has_video, self.has_audio, self.fps, self.duration = video, audio, fps, duration
        self.requested_time_scale, self.max_pixels = time_scale, max_pixels
        self.position_layout, self.timestamps = position_layout, timestamps
        self.alignment = backbone.chunk_alignment(fps, audio)
        self.position_limit: int = backbone.config.get_text_config().max_position_embeddings
        self.next_position_id: float = 0
        self._warned = False

    def empty_step(self) -> ChunkInputs:
        """No positions."""
        return self.join([])

    def text(self, ids: Tensor, positions: Sequence[float] | None = None) -> TokenSpan:
        """A text ``[1, T]`` at `positions`; by default it goes on where the stream is, and moves it on."""
        if positions is None:
            positions = [self.next_position_id + i for i in range(ids.shape[1])]
            self.next_position_id += ids.shape[1]
        embeds = self.backbone.embed(ids)[0]
        rows = torch.tensor(positions, dtype=self.id_dtype).expand(3, -1)
        return TokenSpan(embeds, rows, TEXT, torch.full((len(embeds),), torch.nan))

    def join(self, pieces: Sequence[TokenSpan], next_position_id: float | None = None) -> ChunkInputs:
        """One row of inputs; text that follows stands at `next_position_id`, by default the stream's."""
        device, dtype = self.backbone.device, self.backbone.language_model.dtype
        if not pieces:
            pieces = [self.text(torch.zeros(1, 0, dtype=torch.int64), [])]
        layers = max(0 if piece.deepstack is None else len(piece.deepstack) for piece in pieces)
        following = self.next_position_id if next_position_id is None else next_position_id
        self._check_range(following)

        def deepstack(piece: TokenSpan) -> Tensor:
            if piece.deepstack is None:
                return piece.embeds.new_zeros(layers, *piece.embeds.shape)
            return piece.deepstack

        return ChunkInputs(
            embeds=torch.cat([piece.embeds for piece in pieces])[None].to(dtype),
            position_ids=torch.cat([piece.position_ids for piece in pieces], dim=1)[:, None].to(device),
            modality=torch.cat([torch.full((len(p),), p.modality, dtype=torch.int8) for p in pieces])[None].to(device),
            time=torch.cat([piece.time for piece in pieces])[None].to(device),
            next_position_id=torch.tensor([following], dtype=self.id_dtype, device=device),
            deepstack=torch.cat([deepstack(p) for p in pieces], dim=1)[:, None].to(dtype) if layers > 0 else None,
        )

    def check_start(self, chunk: Chunk) -> None:
        """Refuse a chunk that does not begin where the encoders can be cut.

        Raises
        ------
        OmniMemError
            It does not.
        """
        offset = chunk.t0 / self.alignment
        if abs(offset - round(offset)) > 1e-6:
            raise OmniMemError(
                f"a chunk starts at {chunk.t0:g} s; chunk_seconds must be a multiple of {self.alignment:g} s here"
            )

    def choose_time_scale(self, ids_per_second: float, opening: int) -> float:
        """The given factor on rotary ids a second; ``auto`` lowers it for streams past the trained range, and says so.

        Parameters
        ----------
        ids_per_second : float
            As trained.
        opening : int
            Ids before the media.
        """
        if self.requested_time_scale != "auto":
            return float(self.requested_time_scale)
        chosen = largest_time_scale(self.duration, ids_per_second, self.position_limit, TEXT_RESERVE + opening)
        if chosen < 1:
            logger.info(
                "%.0f s of media reach past the trained position range (%d ids): using %.3g ids a second instead of "
                "%g; set time_scale=1 to keep them",
                self.duration, self.position_limit, ids_per_second * chosen, ids_per_second,
            )  # fmt: skip
        return chosen

    def _check_range(self, position: float) -> None:
        if position > self.position_limit and not self._warned:
            self._warned = True
            logger.warning(
                "positions passed the trained range of %d ids; answers may degrade (time_scale below 1 or "
                "selection.position_ids=compact keep them inside)",
                self.position_limit,
            )


def largest_time_scale(duration: float | None, ids_per_second: float, limit: int, reserve: int) -> float:
    """Largest factor ≤ 1 on ids a second with which `duration` seconds stay inside the trained position range."""
    if duration is None or duration * ids_per_second + reserve <= limit:
        return 1.0
    return (limit - reserve) / (duration * ids_per_second)


def patches_per_timestamp(pictures: int | None, timestamps: int | None) -> int:
    """Pictures behind one time, so that a stream of so many has at most `timestamps`; 1 where either is not known."""
    return 1 if pictures is None or timestamps is None else max(1, -(-pictures // timestamps))


def common_multiple(*seconds: float) -> float:
    """Shortest time that holds whole numbers of each of these."""
    parts = [Fraction(value).limit_denominator(100_000) for value in seconds]
    return float(reduce(lambda a, b: Fraction(lcm(a.numerator, b.numerator), gcd(a.denominator, b.denominator)), parts))


def patch_ids(numbers: Tensor, height: int, width: int, ids_per_patch: Tensor | float = 1) -> Tensor:
    """Ids ``[3, P * height * width]`` of temporal patches, each row after row.

    Parameters
    ----------
    numbers : Tensor
        int64 ``[P]``: which patches of the stream.
    height, width : int
        Positions of a patch by side.
    ids_per_patch : Tensor or float
        Time ids from a patch to the next; rounded down after the product.
    """
    time = (numbers * ids_per_patch).long().repeat_interleave(height * width)
    rows = torch.arange(height).repeat_interleave(width).repeat(len(numbers))
    columns = torch.arange(width).repeat(height * len(numbers))
    return torch.stack((time, rows, columns))

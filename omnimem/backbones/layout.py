"""Base class of stream encoders: concatenate spans of text, video and audio tokens and assign their position ids.

The order of the spans and the position ids of video and audio are the subclass's; everything shared is here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from math import gcd, lcm

import torch
from torch import Tensor

from omnimem.backbones.base import Backbone, StreamEncoder
from omnimem.backbones.chunk_inputs import ChunkInputs
from omnimem.errors import OmniMemError
from omnimem.media import Chunk
from omnimem.modality import TEXT

logger = logging.getLogger("omnimem.backbones")

TEXT_RESERVE = 1024
"""Position ids reserved for question and answer when a time scale is chosen."""


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive tokens of one modality, such as those of a temporal patch.

    Attributes
    ----------
    embeds : Tensor
        ``[N, C]`` input embeddings.
    position_ids : Tensor
        ``[3, N]`` rotary coordinates (time, height, width).
    modality : int
        See `omnimem.modality`.
    time : Tensor
        float32 ``[N]`` seconds since the start of the media; NaN for text and closing tokens.
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
    """A stream encoder that concatenates token spans.

    Parameters
    ----------
    backbone : Backbone
        The model.
    video, audio, fps, duration, time_scale, max_pixels, position_layout, timestamps
        See `Backbone.stream_encoder`; a subclass ignores options that its layout does not have.

    Raises
    ------
    OmniMemError
        Neither video nor audio, or audio only for a model without audio support.
    """

    id_dtype = torch.int64
    """Dtype of position ids."""

    def __init__(
        self,
        backbone: Backbone,
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
        """Inputs without tokens."""
        return self.join([])

    def text(self, ids: Tensor, position_ids: Sequence[float] | None = None) -> TokenSpan:
        """Span of text tokens ``[1, T]`` at `position_ids`; by default at the next position ids, which then advance."""
        if position_ids is None:
            position_ids = [self.next_position_id + i for i in range(ids.shape[1])]
            self.next_position_id += ids.shape[1]
        embeds = self.backbone.embed(ids)[0]
        rows = torch.tensor(position_ids, dtype=self.id_dtype).expand(3, -1)
        return TokenSpan(embeds, rows, TEXT, torch.full((len(embeds),), torch.nan))

    def join(self, spans: Sequence[TokenSpan], next_position_id: float | None = None) -> ChunkInputs:
        """Concatenate spans to inputs of batch size 1; `next_position_id` defaults to the encoder's."""
        device, dtype = self.backbone.device, self.backbone.language_model.dtype
        if not spans:
            spans = [self.text(torch.zeros(1, 0, dtype=torch.int64), [])]
        layers = max(0 if span.deepstack is None else len(span.deepstack) for span in spans)
        following = self.next_position_id if next_position_id is None else next_position_id
        self._check_range(following)

        def deepstack(span: TokenSpan) -> Tensor:
            if span.deepstack is None:
                return span.embeds.new_zeros(layers, *span.embeds.shape)
            return span.deepstack

        modality = [torch.full((len(span),), span.modality, dtype=torch.int8) for span in spans]
        return ChunkInputs(
            embeds=torch.cat([span.embeds for span in spans])[None].to(dtype),
            position_ids=torch.cat([span.position_ids for span in spans], dim=1)[:, None].to(device),
            modality=torch.cat(modality)[None].to(device),
            time=torch.cat([span.time for span in spans])[None].to(device),
            next_position_id=torch.tensor([following], dtype=self.id_dtype, device=device),
            deepstack=torch.cat([deepstack(span) for span in spans], dim=1)[:, None].to(dtype) if layers > 0 else None,
        )

    def check_start(self, chunk: Chunk) -> None:
        """Check that a chunk starts at a multiple of the chunk alignment.

        Raises
        ------
        OmniMemError
            The start is not a multiple of the chunk alignment.
        """
        offset = chunk.t0 / self.alignment
        if abs(offset - round(offset)) > 1e-6:
            raise OmniMemError(
                f"a chunk starts at {chunk.t0:g} s; chunk_seconds must be a multiple of {self.alignment:g} s here"
            )

    def choose_time_scale(self, ids_per_second: float, prefix_tokens: int) -> float:
        """Factor on time ids per second; ``auto`` logs and returns one below 1 if the stream exceeds the trained ids.

        Parameters
        ----------
        ids_per_second : float
            Time ids per second in training.
        prefix_tokens : int
            Position ids used before the media.
        """
        if self.requested_time_scale != "auto":
            return float(self.requested_time_scale)
        chosen = largest_time_scale(self.duration, ids_per_second, self.position_limit, TEXT_RESERVE + prefix_tokens)
        if chosen < 1:
            logger.info(
                "%.0f s of media exceed the trained range of %d position ids: using %.3g ids per second instead of %g; "
                "set data.time_scale=1 to keep the trained rate",
                self.duration, self.position_limit, ids_per_second * chosen, ids_per_second,
            )  # fmt: skip
        return chosen

    def _check_range(self, position_id: float) -> None:
        if position_id > self.position_limit and not self._warned:
            self._warned = True
            logger.warning(
                "position ids exceed the trained range of %d; answers may degrade. To keep them in range, set "
                "selection.position_ids=compact or, for models with time ids, data.time_scale below 1",
                self.position_limit,
            )


def largest_time_scale(duration: float | None, ids_per_second: float, limit: int, reserve: int) -> float:
    """Largest factor ≤ 1 such that `duration` seconds and `reserve` ids fit into `limit` position ids."""
    if duration is None or duration * ids_per_second + reserve <= limit:
        return 1.0
    return (limit - reserve) / (duration * ids_per_second)


def patches_per_timestamp(patches: int | None, timestamps: int | None) -> int:
    """Temporal patches per timestamp, so that `patches` need at most `timestamps`; 1 if either is None."""
    return 1 if patches is None or timestamps is None else max(1, -(-patches // timestamps))


def common_multiple(*seconds: float) -> float:
    """Least common multiple of durations in seconds (resolved to 10 µs)."""
    parts = [Fraction(value).limit_denominator(100_000) for value in seconds]
    return float(reduce(lambda a, b: Fraction(lcm(a.numerator, b.numerator), gcd(a.denominator, b.denominator)), parts))


def patch_position_ids(numbers: Tensor, height: int, width: int, ids_per_patch: Tensor | float = 1) -> Tensor:
    """Position ids ``[3, P * height * width]`` (time, height, width) of temporal patches, row by row.

    Parameters
    ----------
    numbers : Tensor
        int64 ``[P]``: indices of the patches in the stream.
    height, width : int
        Tokens per patch along each side.
    ids_per_patch : Tensor or float
        Time ids per patch; the product with the index is rounded down.
    """
    time = (numbers * ids_per_patch).long().repeat_interleave(height * width)
    rows = torch.arange(height).repeat_interleave(width).repeat(len(numbers))
    columns = torch.arange(width).repeat(height * len(numbers))
    return torch.stack((time, rows, columns))

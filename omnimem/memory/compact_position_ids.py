"""The position id policy `compact`: after every compression retained tokens get consecutive position ids.

A stream then never leaves the rotary range a model was trained on, however long it is, and retained tokens are close
together, as in StreamingLLM (arXiv 2309.17453). In each layer the gaps that evicted tokens leave in the time ids are
closed, and the ids are shifted so that all layers end at the same id, right before the next chunk. Equal ids stay
equal, so video and audio stay aligned. Text before the media keeps its ids.

Height and width ids of frames that count from the start of the media (Qwen2.5-Omni) are unchanged. Those that count
from the current position (Qwen3-VL, `spatial_ids_advance`) are shifted along, and later tokens come after their
maximum.

Keys are stored without rotation and rotated to their present ids in every forward pass, so rounding errors do not
accumulate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omnimem.modality import VISUAL
from omnimem.token_metadata import TokenMetadata

BEYOND = 2**40
"""Larger than every position id."""


class CompactPositionIds:
    """Position ids of one stream (or batch of streams) under `compact`.

    Attributes
    ----------
    spatial_ids_advance : bool
        Whether height and width ids of frames count from the current position of the stream.
    """

    def __init__(self) -> None:
        self.spatial_ids_advance = False
        self.start: Tensor | None = None
        self.next: Tensor | None = None
        self.shift: Tensor | None = None

    def assign(
        self, position_ids: Tensor, modality: Tensor, valid: Tensor | None, next_position_id: Tensor, text: bool
    ) -> tuple[Tensor, Tensor]:
        """Shift an encoder's ids to the end of the cache.

        Parameters
        ----------
        position_ids : Tensor
            ``[3, B, T]`` ids that count from the start of the stream.
        modality, valid : Tensor
            ``[B, T]``.
        next_position_id : Tensor
            ``[B]`` id of the text that follows.
        text : bool
            Whether this is text around the media.

        Returns
        -------
        tuple of Tensor
            The shifted ids and the shifted id of the text that follows.
        """
        time = position_ids[0]
        if valid is not None:
            time = time.masked_fill(~valid, BEYOND)
        first = torch.cat((time, next_position_id[:, None].to(time.dtype)), dim=1).amin(1)
        if self.start is None and not text:
            self.start = first
        if self.next is None:
            return position_ids, next_position_id
        if self.shift is None:
            self.shift = self.next - first
        moved = position_ids + self.shift[None, :, None]
        if not self.spatial_ids_advance:
            moved[1:] = torch.where(modality == VISUAL, position_ids[1:], moved[1:])
        return moved, next_position_id + self.shift

    def renumber(self, metadata: Sequence[TokenMetadata], batch: int) -> list[TokenMetadata]:
        """Close the gaps between the retained tokens of every layer, so that all layers end at the same id, `next`."""
        if self.start is None:
            return list(metadata)
        closed = []
        following = self.start
        for layer in metadata:
            start = self.start.repeat_interleave(len(layer.index) // batch)
            time, height_width = layer.position_ids[..., 0], layer.position_ids[..., 1:].amax(-1)
            media = layer.valid & (time >= start[:, None])
            is_frame = media & (layer.modality == VISUAL)
            # Height and width ids that move with the time ids occupy ids that no other token may have.
            occupied = (
                torch.where(is_frame, torch.maximum(time, height_width), time) if self.spatial_ids_advance else time
            )
            ids, end = _without_gaps(time, occupied, media, start)
            beside = (
                end
                if self.spatial_ids_advance
                else torch.maximum(end, height_width.masked_fill(~is_frame, -1).amax(1) + 1)
            )
            following = torch.maximum(following, beside.view(batch, -1).amax(1))
            closed.append((media, ids, end))
        self.next, self.shift = following, None
        return [
            self._moved(layer, media, ids + (following.repeat_interleave(len(end) // batch) - end)[:, None])
            for layer, (media, ids, end) in zip(metadata, closed, strict=True)
        ]

    def _moved(self, metadata: TokenMetadata, media: Tensor, time: Tensor) -> TokenMetadata:
        position_ids = time[..., None].expand_as(metadata.position_ids).clone()
        height_width = metadata.position_ids[..., 1:]
        if self.spatial_ids_advance:
            height_width = height_width + (time - metadata.position_ids[..., 0])[..., None]
        position_ids[..., 1:] = torch.where(
            (metadata.modality == VISUAL)[..., None], height_width, position_ids[..., 1:]
        )
        position_ids = torch.where(media[..., None], position_ids, metadata.position_ids)
        return TokenMetadata(metadata.index, position_ids, metadata.time, metadata.modality, metadata.valid)

    def state(self) -> tuple[Tensor | None, ...]:
        """Snapshot for `restore`."""
        return self.start, self.next, self.shift

    def restore(self, state: tuple[Tensor | None, ...]) -> None:
        """Return to a snapshot."""
        self.start, self.next, self.shift = state


def _without_gaps(time: Tensor, occupied: Tensor, media: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Time ids ``[R, N]`` of media from `start` ``[R]`` on, without unused ids, and one past the largest ``[R]``."""
    ordered, order = time.masked_fill(~media, BEYOND).sort(dim=1)
    member = media.gather(1, order)
    # For each token: one past the ids that earlier tokens occupy. What lies between is a gap.
    taken = torch.cat((start[:, None], occupied.gather(1, order)[:, :-1] + 1), dim=1).cummax(1).values
    gaps = (ordered - taken).clamp_min(0).masked_fill(~member, 0).cumsum(1)
    ids = time - torch.zeros_like(gaps).scatter_(1, order, gaps)
    end = (ids + occupied - time + 1).masked_fill(~media, 0).amax(1)
    return ids, torch.maximum(end, start)

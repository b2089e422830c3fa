"""The position policy `compact`: retained positions are numbered densely anew after every compression.

A stream then never leaves the rotary range a model was trained on, however long it is, and what is retained stands
close together, as in StreamingLLM. In every layer the time ids that no retained position of the media stands on are
left out, and the others end right before the next chunk; equal ids stay equal, so picture and sound stay aligned. Text
before the media keeps its ids, and so do the height and width ids of pictures, which count from the start of the media.
Where they count from the present place instead, as in the Qwen3-VL family, they move with the time ids and what follows
stays behind them, so there nothing changes while nothing is evicted. Keys are stored without rotation and rotated to
their present ids in every step, so nothing accumulates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omnimem.memory.table import TokenMetadata
from omnimem.modality import VISUAL

BEYOND = 2**40
"""An id that no position has."""


class CompactPositionIds:
    """Ids of one stream (or batch of streams) under `compact`.

    Attributes
    ----------
    anchored : bool
        Whether height and width ids of pictures count from the present place of the stream.
    """

    def __init__(self) -> None:
        self.anchored = False
        self.start: Tensor | None = None
        self.next: Tensor | None = None
        self.shift: Tensor | None = None

    def assign(
        self, positions: Tensor, modality: Tensor, valid: Tensor | None, next_position_id: Tensor, text: bool
    ) -> tuple[Tensor, Tensor]:
        """Move an encoder's ids to where the memory ends.

        Parameters
        ----------
        positions : Tensor
            ``[3, B, T]`` ids that count on from the start of the stream.
        modality, valid : Tensor
            ``[B, T]``.
        next_position_id : Tensor
            ``[B]`` id of the text that follows.
        text : bool
            Whether this is text around the media.

        Returns
        -------
        tuple of Tensor
            The moved ids and the moved id of the text that follows.
        """
        time = positions[0]
        if valid is not None:
            time = time.masked_fill(~valid, BEYOND)
        first = torch.cat((time, next_position_id[:, None].to(time.dtype)), dim=1).amin(1)
        if self.start is None and not text:
            self.start = first
        if self.next is None:
            return positions, next_position_id
        if self.shift is None:
            self.shift = self.next - first
        moved = positions + self.shift[None, :, None]
        if not self.anchored:
            moved[1:] = torch.where(modality == VISUAL, positions[1:], moved[1:])
        return moved, next_position_id + self.shift

    def renumber(self, tables: Sequence[TokenMetadata], batch: int) -> list[TokenMetadata]:
        """Close the gaps between what every layer retains, so that all end at the same id, `next`."""
        if self.start is None:
            return list(tables)
        closed = []
        following = self.start
        for table in tables:
            start = self.start.repeat_interleave(len(table.index) // batch)
            time, sides = table.position_ids[..., 0], table.position_ids[..., 1:].amax(-1)
            media = table.valid & (time >= start[:, None])
            picture = media & (table.modality == VISUAL)
            # Sides that move with the time ids take up ids of their own, which nothing else may stand on.
            reach = torch.where(picture, torch.maximum(time, sides), time) if self.anchored else time
            ids, end = _without_gaps(time, reach, media, start)
            beside = end if self.anchored else torch.maximum(end, sides.masked_fill(~picture, -1).amax(1) + 1)
            following = torch.maximum(following, beside.view(batch, -1).amax(1))
            closed.append((media, ids, end))
        self.next, self.shift = following, None
        return [
            self._moved(table, media, ids + (following.repeat_interleave(len(end) // batch) - end)[:, None])
            for table, (media, ids, end) in zip(tables, closed, strict=True)
        ]

    def _moved(self, table: TokenMetadata, media: Tensor, time: Tensor) -> TokenMetadata:
        position = time[..., None].expand_as(table.position_ids).clone()
        sides = table.position_ids[..., 1:]
        if self.anchored:
            sides = sides + (time - table.position_ids[..., 0])[..., None]
        position[..., 1:] = torch.where((table.modality == VISUAL)[..., None], sides, position[..., 1:])
        position = torch.where(media[..., None], position, table.position_ids)
        return TokenMetadata(table.index, position, table.time, table.modality, table.valid)

    def state(self) -> tuple[Tensor | None, ...]:
        """Snapshot for `restore`."""
        return self.start, self.next, self.shift

    def restore(self, state: tuple[Tensor | None, ...]) -> None:
        """Return to a snapshot."""
        self.start, self.next, self.shift = state


def _without_gaps(time: Tensor, reach: Tensor, media: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Number media from `start` ``[R]`` on, without ids that nothing is left on: new time ids ``[R, N]``, their end."""
    ordered, order = time.masked_fill(~media, BEYOND).sort(dim=1)
    member = media.gather(1, order)
    # Before each position: one past all that the earlier ones take up. What lies between is a gap.
    taken = torch.cat((start[:, None], reach.gather(1, order)[:, :-1] + 1), dim=1).cummax(1).values
    gaps = (ordered - taken).clamp_min(0).masked_fill(~member, 0).cumsum(1)
    ids = time - torch.zeros_like(gaps).scatter_(1, order, gaps)
    end = (ids + reach - time + 1).masked_fill(~media, 0).amax(1)
    return ids, torch.maximum(end, start)

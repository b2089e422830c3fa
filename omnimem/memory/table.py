"""What is known about each stored position besides its key and value."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class PositionTable:
    """Columns of per-position facts, one row a stored position.

    Attributes
    ----------
    index : Tensor
        int64 ``[B, N]``: which position of the sample's stream this is, 0 for the first.
    position : Tensor
        ``[B, N, 3]``: rotary position ids (time, height, width), dtype of the backbone's ids.
    time : Tensor
        float32 ``[B, N]``: seconds into the media; NaN for text.
    modality : Tensor
        int8 ``[B, N]``: see `omnimem.modality`.
    valid : Tensor
        bool ``[B, N]``: False where a shorter sample of the batch is padded.
    """

    index: Tensor
    position: Tensor
    time: Tensor
    modality: Tensor
    valid: Tensor

    def __len__(self) -> int:
        return self.index.shape[1]

    def append(self, new: PositionTable) -> PositionTable:
        """Table of the positions of `self` followed by those of `new`."""
        return PositionTable(*(torch.cat((a, b), dim=1) for a, b in zip(self._columns, new._columns, strict=True)))

    def gather(self, keep: Tensor, valid: Tensor) -> PositionTable:
        """Table of the columns `keep` (int64 ``[B, M]``), real where `valid` (bool ``[B, M]``)."""
        rows = torch.arange(keep.shape[0], device=keep.device)[:, None]
        index, position, time, modality, _ = (column[rows, keep] for column in self._columns)
        return PositionTable(index, position, time, modality, valid)

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return sum(column.nbytes for column in self._columns)

    @property
    def _columns(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, column.name) for column in fields(self))

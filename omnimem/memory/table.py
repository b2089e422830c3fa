"""What is known about each stored position besides its key and value."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from omnimem.modality import KINDS


@dataclass(frozen=True)
class TokenMetadata:
    """Facts of each stored position.

    R is the number of rows: one a sample; where every key-value head keeps its own positions, one a sample and head.

    Attributes
    ----------
    index : Tensor
        int64 ``[R, N]``: which position of the sample's stream this is, 0 for the first; -1 - i for one made of
        several, the first of which was i.
    position : Tensor
        ``[R, N, 3]``: rotary position ids (time, height, width), dtype of the backbone's ids.
    time : Tensor
        float32 ``[R, N]``: seconds into the media; NaN for text.
    modality : Tensor
        int8 ``[R, N]``: see `omnimem.modality`.
    valid : Tensor
        bool ``[R, N]``: False where a shorter sample of the batch is padded.
    """

    index: Tensor
    position_ids: Tensor
    time: Tensor
    modality: Tensor
    valid: Tensor

    def __len__(self) -> int:
        return self.index.shape[1]

    def append(self, new: TokenMetadata) -> TokenMetadata:
        """Table of the positions of `self` followed by those of `new`."""
        return TokenMetadata(*(torch.cat((a, b), dim=1) for a, b in zip(self._columns, new._columns, strict=True)))

    def repeat(self, rows: int) -> TokenMetadata:
        """Each sample's row so many times over: one for every key-value head."""
        if rows == 1:
            return self
        return TokenMetadata(*(column.repeat_interleave(rows, dim=0) for column in self._columns))

    def gather(self, keep: Tensor, valid: Tensor) -> TokenMetadata:
        """Table of the columns `keep` (int64 ``[R, M]``), real where `valid` (bool ``[R, M]``)."""
        rows = torch.arange(keep.shape[0], device=keep.device)[:, None]
        index, position, time, modality, _ = (column[rows, keep] for column in self._columns)
        return TokenMetadata(index, position, time, modality, valid)

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return sum(column.nbytes for column in self._columns)

    @property
    def _columns(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, column.name) for column in fields(self))


def count(modality: Tensor, real: Tensor) -> list[dict[str, int]]:
    """Text, visual and audio positions of each sample ``[R, N]``; one wait for the device."""
    kinds = torch.tensor(list(KINDS.values()), device=modality.device)
    found = ((modality[..., None] == kinds) & real[..., None]).sum(1).tolist()
    return [dict(zip(KINDS, sample, strict=True)) for sample in found]

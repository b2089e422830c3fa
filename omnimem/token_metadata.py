"""What is known about each stored token besides its key and value."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from omnimem.modality import KINDS


@dataclass(frozen=True)
class TokenMetadata:
    """Metadata of N tokens in R rows.

    A row is one sample; where every key-value head retains its own tokens, one sample and head.

    Attributes
    ----------
    index : Tensor
        int64 ``[R, N]``: number of the token in its stream, 0 for the first. A merged token has -1 - i, where i is the
        first token that was merged into it.
    position_ids : Tensor
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
        """Metadata of the tokens of `self` followed by those of `new`."""
        return TokenMetadata(*(torch.cat((a, b), dim=1) for a, b in zip(self._columns, new._columns, strict=True)))

    def repeat(self, heads: int) -> TokenMetadata:
        """Repeat each sample's row, one row for every key-value head."""
        if heads == 1:
            return self
        return TokenMetadata(*(column.repeat_interleave(heads, dim=0) for column in self._columns))

    def gather(self, columns: Tensor, valid: Tensor) -> TokenMetadata:
        """Metadata of the tokens at `columns` (int64 ``[R, M]``), real where `valid` (bool ``[R, M]``)."""
        rows = torch.arange(columns.shape[0], device=columns.device)[:, None]
        index, position_ids, time, modality, _ = (column[rows, columns] for column in self._columns)
        return TokenMetadata(index, position_ids, time, modality, valid)

    @staticmethod
    def token_nbytes(id_dtype: torch.dtype) -> int:
        """Bytes of one token in all columns, for position ids of this dtype."""
        return torch.int64.itemsize + 3 * id_dtype.itemsize + torch.float32.itemsize + 1 + 1

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return sum(column.nbytes for column in self._columns)

    @property
    def _columns(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, column.name) for column in fields(self))


def count_tokens(modality: Tensor, valid: Tensor) -> list[dict[str, int]]:
    """Text, visual and audio tokens of each row of ``[R, N]``; synchronises with the device once."""
    kinds = torch.tensor(list(KINDS.values()), device=modality.device)
    found = ((modality[..., None] == kinds) & valid[..., None]).sum(1).tolist()
    return [dict(zip(KINDS, sample, strict=True)) for sample in found]

"""A tensor of stored tokens that grows by appending and shrinks by compaction, in place or under autograd.

At inference the tensor is a view of a preallocated buffer: new tokens are written after the stored ones, and
compaction moves retained tokens to the front. Under autograd the same calls concatenate and gather, so gradients flow
and nothing that an earlier step still needs is overwritten. The caller sees one interface: every method returns the
new value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TILE = 1024
"""Tokens moved at once by an in-place compaction; bounds the scratch memory."""


@dataclass(frozen=True)
class TokenBuffer:
    """Tokens along one dimension, batch first.

    An older object stays valid until the next in-place `compact`, which overwrites the shared buffer.

    Attributes
    ----------
    dim : int
        Dimension that counts tokens: 2 for states ``[R, G, N, D]``, 1 for features ``[R, N, F]``.
    tensor : Tensor or None
        The N stored tokens; None before the first `append`.
    storage : Tensor or None
        The preallocated buffer of which `tensor` is a view; None under autograd.
    """

    dim: int
    tensor: Any = None
    storage: Any = None

    @property
    def empty(self) -> TokenBuffer:
        """The same buffer without tokens."""
        return TokenBuffer(self.dim)

    def append(self, new: Tensor, capacity: Callable[[], int | None]) -> TokenBuffer:
        """Add tokens after the stored ones.

        Parameters
        ----------
        new : Tensor
            The new tokens.
        capacity : callable
            Returns the largest number of tokens ever stored at once, None for no limit. Called only when the buffer has
            to grow, which doubles it up to that limit.
        """
        if torch.is_grad_enabled():
            return TokenBuffer(self.dim, new if self.tensor is None else torch.cat((self.tensor, new), self.dim))
        stored = 0 if self.tensor is None else self.tensor.shape[self.dim]
        stop = stored + new.shape[self.dim]
        storage = self.storage
        if storage is None or storage.shape[self.dim] < stop:
            storage = self._grown(new, max(stop, min(2 * stop, capacity() or 2 * stop)))
        storage.narrow(self.dim, stored, stop - stored).copy_(new)
        return self._view(storage, stop)

    def reserve(self, count: int) -> TokenBuffer:
        """Make room for `count` tokens after the stored ones, so that appending them copies nothing else."""
        if self.storage is None:
            return self
        stored = self.tensor.shape[self.dim]
        if self.storage.shape[self.dim] >= stored + count:
            return self
        return self._view(self._grown(self.storage, stored + count), stored)

    def compact(self, columns: Tensor) -> TokenBuffer:
        """Retain the tokens at `columns` (int64 ``[R, M]``, ascending in each row)."""
        if self.tensor is None:
            return self
        if self.storage is None:
            return TokenBuffer(self.dim, self._gather(self.tensor, columns))
        # The source of column j is at least j, so a tile never overwrites what a later tile has to read.
        for start in range(0, columns.shape[1], TILE):
            tile = columns[:, start : start + TILE]
            self.storage.narrow(self.dim, start, tile.shape[1]).copy_(self._gather(self.storage, tile))
        return self._view(self.storage, columns.shape[1])

    def read(self, columns: Tensor) -> Tensor | None:
        """Copy of the tokens at `columns` (int64 ``[R, M]``); None where nothing is stored."""
        return None if self.tensor is None else self._gather(self.tensor, columns)

    def gather_gradient(self, gradient: Tensor, columns: Tensor) -> Tensor:
        """Gradient of tokens that moved to `columns` (int64 ``[R, N]``); 0 where the column is -1: evicted."""
        return self._gather(gradient, columns.clamp_min(0)).masked_fill_(self._broadcast(columns < 0, gradient), 0)

    def tail(self, start: int) -> Tensor:
        """The tokens from column `start` on."""
        return self.tensor.narrow(self.dim, start, self.tensor.shape[self.dim] - start)

    def masked_tail(self, gradient: Tensor, start: int, hidden: Tensor) -> Tensor:
        """Part of a gradient from column `start` on, 0 where `hidden` (bool ``[R, N]``), in the dtype of the tokens."""
        part = gradient.narrow(self.dim, start, gradient.shape[self.dim] - start)
        return part.masked_fill(self._broadcast(hidden[:, start:], part), 0).to(self.tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held, the whole buffer at inference."""
        held = self.tensor if self.storage is None else self.storage
        return 0 if held is None else held.nbytes

    def _view(self, storage: Tensor, count: int) -> TokenBuffer:
        return TokenBuffer(self.dim, storage.narrow(self.dim, 0, count), storage)

    def _grown(self, like: Tensor, capacity: int) -> Tensor:
        """A larger storage that begins with the stored tokens."""
        shape = list(like.shape)
        shape[self.dim] = capacity
        storage = like.new_empty(shape)
        if self.tensor is not None:
            storage.narrow(self.dim, 0, self.tensor.shape[self.dim]).copy_(self.tensor)
        return storage

    def _broadcast(self, values: Tensor, like: Tensor) -> Tensor:
        """One value per token ``[R, N]``, shaped to broadcast over `like`."""
        shape = [1] * like.ndim
        shape[0], shape[self.dim] = values.shape
        return values.view(shape)

    def _gather(self, source: Tensor, columns: Tensor) -> Tensor:
        if columns.shape[0] == 1:
            return source.index_select(self.dim, columns[0])
        size = list(source.shape)
        size[self.dim] = columns.shape[1]
        return source.gather(self.dim, self._broadcast(columns, source).expand(size))

"""A tensor of stored positions that grows by appending and shrinks by keeping: in place, or under autograd.

At inference it is a view of a preallocated buffer: new columns are written behind the stored ones, and keeping moves
columns to the front. Under autograd the same calls concatenate and gather, so gradients flow and nothing that an
earlier step still needs is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

COLUMNS = ("_keys", "_values", "_features")
"""Attributes of a layer that are `Columns`."""

TILE = 1024
"""Columns moved at once when keeping in place; bounds the scratch memory."""


class TokenBuffer:
    """Columns of positions along one dimension, batch first.

    Parameters
    ----------
    dim : int
        Dimension that counts positions: 2 for states ``[B, G, N, D]``, 1 for features ``[B, N, F]``.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.tensor: Any = None
        self.buffer: Any = None

    def append(self, new: Tensor, bound: Callable[[], int | None]) -> Tensor:
        """Add columns behind the stored ones and return all.

        Parameters
        ----------
        new : Tensor
            The new columns.
        bound : callable
            Says how many columns can ever be stored at once, None for no limit; asked only when the buffer has to
            grow, which doubles it but never past that.
        """
        if torch.is_grad_enabled():
            self.tensor = new if self.tensor is None else torch.cat((self.tensor, new), self.dim)
            self.buffer = None
            return self.tensor
        stored = 0 if self.tensor is None else self.tensor.shape[self.dim]
        stop = stored + new.shape[self.dim]
        if self.buffer is None or self.buffer.shape[self.dim] < stop:
            self.buffer = self._grown(new, max(stop, min(2 * stop, bound() or 2 * stop)))
        self.buffer.narrow(self.dim, stored, stop - stored).copy_(new)
        self.tensor = self.buffer.narrow(self.dim, 0, stop)
        return self.tensor

    def _grown(self, like: Tensor, capacity: int) -> Tensor:
        """A buffer of `capacity` columns that begins with the stored ones."""
        shape = list(like.shape)
        shape[self.dim] = capacity
        buffer = like.new_empty(shape)
        if self.tensor is not None:
            buffer.narrow(self.dim, 0, self.tensor.shape[self.dim]).copy_(self.tensor)
        return buffer

    def reserve(self, columns: int) -> None:
        """Make room for so many columns behind the stored ones, in place, so that appending them copies nothing."""
        if self.buffer is None:
            return
        stop = self.tensor.shape[self.dim] + columns
        if self.buffer.shape[self.dim] < stop:
            self.buffer = self._grown(self.buffer, stop)
            self.tensor = self.buffer.narrow(self.dim, 0, stop - columns)

    def compact(self, columns: Tensor) -> Tensor:
        """Keep the columns ``[B, M]``, ascending in each row, and return them."""
        if self.buffer is None:
            self.tensor = self._gather(self.tensor, columns)
            return self.tensor
        # Ascending, column j comes from j or later: a tile never overwrites what a later tile has to read.
        for start in range(0, columns.shape[1], TILE):
            tile = columns[:, start : start + TILE]
            self.buffer.narrow(self.dim, start, tile.shape[1]).copy_(self._gather(self.buffer, tile))
        self.tensor = self.buffer.narrow(self.dim, 0, columns.shape[1])
        return self.tensor

    def read(self, columns: Tensor) -> Tensor | None:
        """A copy of the columns ``[B, M]``; None where nothing is stored."""
        return None if self.tensor is None else self._gather(self.tensor, columns)

    def truncate(self, count: int) -> None:
        """Forget all but the first `count` columns, and the buffer."""
        self.tensor, self.buffer = self.tensor.narrow(self.dim, 0, count), None

    def rebuild(self, others: Sequence[Tensor], place: Tensor) -> None:
        """Select the columns at `place` (int64 ``[R, N]``) among the stored ones followed by `others`."""
        self.tensor, self.buffer = self._gather(torch.cat((self.tensor, *others), self.dim), place), None

    def moved_back(self, gradient: Tensor, place: Tensor) -> Tensor:
        """Gradient of columns that were at `place` (int64 ``[R, N]``) after a step; 0 for those evicted, at -1."""
        return self._gather(gradient, place.clamp_min(0)).masked_fill_(self._spread(place < 0, gradient), 0)

    def brought(self, gradient: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """The stored columns that are not `old` (bool ``[R, M]``, old ones in front), and their part of a gradient.

        Rows have different numbers of them; where a row has more old ones than another, their gradient is 0.
        """
        start = int(old.sum(1).min())
        new = gradient.narrow(self.dim, start, gradient.shape[self.dim] - start)
        new = new.masked_fill(self._spread(old[:, start:], new), 0).to(self.tensor.dtype)
        return self.tensor.narrow(self.dim, start, new.shape[self.dim]), new

    def _spread(self, values: Tensor, like: Tensor) -> Tensor:
        """One value a column ``[R, N]`` in the dimensions of a stored tensor."""
        shape = [1] * like.ndim
        shape[0], shape[self.dim] = values.shape
        return values.view(shape)

    def _gather(self, source: Tensor, columns: Tensor) -> Tensor:
        if columns.shape[0] == 1:
            return source.index_select(self.dim, columns[0])
        size = list(source.shape)
        size[self.dim] = columns.shape[1]
        return source.gather(self.dim, self._spread(columns, source).expand(size))

    def state(self) -> tuple[Any, Any]:
        """Snapshot for `restore`; valid until the next `take` in place."""
        return self.tensor, self.buffer

    def restore(self, state: tuple[Any, Any]) -> None:
        """Return to a snapshot."""
        self.tensor, self.buffer = state

    @property
    def nbytes(self) -> int:
        """Bytes held, the whole buffer at inference."""
        held = self.tensor if self.buffer is None else self.buffer
        return 0 if held is None else held.nbytes

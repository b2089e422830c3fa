"""A tensor of stored tokens that grows by appending and shrinks by compaction, in place or under autograd.

At inference the tensor is a view of a preallocated buffer: new tokens are written after the stored ones, and
compaction moves retained tokens to the front. Under autograd the same calls concatenate and gather, so gradients flow
and nothing that an earlier step still needs is overwritten. The caller sees one interface: every method returns the
new value.

With a codec, tokens are stored as bytes. New ones wait in the *tail*, unrounded, until `settle` encodes them, once.
Under autograd the same calls keep floats: the tail is rounded instead of encoded, to the same values, and its gradient
passes straight through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from omnimem.memory.codec import Codec
from omnimem.selection.feature_codec import FeatureCodec

TILE = 1024
"""Tokens moved at once by an in-place compaction; bounds the scratch memory."""

ALL = slice(None)


@dataclass(frozen=True)
class TokenBuffer:
    """Tokens along one dimension, batch first.

    An older object stays valid until the next in-place `compact`, which overwrites the shared buffer.

    Attributes
    ----------
    dim : int
        Dimension that counts tokens: 2 for states ``[R, G, N, D]``, 1 for features ``[R, N, F]``.
    tensor : Tensor or None
        The stored tokens; None before the first `append`. With a codec, those that are settled: bytes, or floats
        under autograd; floats stay floats.
    storage : Tensor or None
        The preallocated buffer of which `tensor` is a view; None under autograd.
    codec : Codec, FeatureCodec or None
        How tokens are encoded; None: not at all, and then there is no tail.
    tail : Tensor or None
        The last tokens, not yet settled.
    dtype : torch.dtype or None
        Dtype of the states, with a codec.
    """

    dim: int
    tensor: Any = None
    storage: Any = None
    codec: Codec | FeatureCodec | None = None
    tail: Any = None
    dtype: Any = None

    @property
    def empty(self) -> TokenBuffer:
        """The same buffer without tokens."""
        return self.holding(None)

    def holding(self, tensor: Tensor | None) -> TokenBuffer:
        """The same buffer with other tokens, all of them settled."""
        return replace(self, tensor=tensor, storage=None, tail=None)

    @property
    def encoded(self) -> bool:
        """Whether there are tokens stored as bytes."""
        return self.codec is not None and self.tensor is not None and not self.tensor.is_floating_point()

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
        if self.codec is not None:
            return replace(self, tail=self._joined(self.tail, new), dtype=new.dtype)
        if torch.is_grad_enabled():
            return self.holding(self._joined(self.tensor, new))
        return self._written(new, capacity)

    def settle(self, capacity: Callable[[], int | None]) -> TokenBuffer:
        """Encode the tokens that wait in the tail; `capacity` as in `append`."""
        if self.codec is None or self.tail is None:
            return self
        if torch.is_grad_enabled() or not (self.tensor is None or self.encoded):
            return self.holding(self.settled_states)
        return replace(self, tail=None)._written(self.codec.encode(self.tail), capacity)

    @property
    def states(self) -> Any:
        """All tokens as floats, the settled ones decoded; None before the first `append`."""
        if self.codec is None or (self.tensor is None and self.tail is None):
            return self.tensor
        return self.states_of(ALL, ALL)

    @property
    def settled_states(self) -> Any:
        """What `states` is once the tail has been settled."""
        if self.codec is None or self.tail is None:
            return self.states
        return replace(self, tail=self.codec.rounded(self.tail)).states

    def states_of(self, rows: slice, heads: slice) -> Tensor:
        """`states` of some rows and heads; only they are decoded."""
        settled: Any = None if self.tensor is None else self._decoded(self.tensor[rows, heads])
        return settled if self.tail is None else self._joined(settled, self.tail[rows, heads])

    def states_at(self, columns: Tensor) -> Tensor:
        """`states` of the settled tokens at `columns` (int64 ``[R, M]``); only they are decoded."""
        return self._decoded(self._gather(self.tensor, columns))

    def reserve(self, count: int) -> TokenBuffer:
        """Make room for `count` tokens after the stored ones, so that appending them copies nothing else."""
        if self.storage is None or self.codec is not None:  # new tokens wait in the tail
            return self
        stored = self.tensor.shape[self.dim]
        if self.storage.shape[self.dim] >= stored + count:
            return self
        return self._view(self._grown(self.storage, stored + count), stored)

    def compact(self, columns: Tensor) -> TokenBuffer:
        """Retain the tokens at `columns` (int64 ``[R, M]``, ascending in each row); all are settled."""
        assert self.tail is None
        if self.tensor is None:
            return self
        if self.storage is None:
            return self.holding(self._gather(self.tensor, columns))
        # The source of column j is at least j, so a tile never overwrites what a later tile has to read.
        for start in range(0, columns.shape[1], TILE):
            tile = columns[:, start : start + TILE]
            self.storage.narrow(self.dim, start, tile.shape[1]).copy_(self._gather(self.storage, tile))
        return self._view(self.storage, columns.shape[1])

    def read(self, columns: Tensor) -> Tensor | None:
        """Copy of the settled tokens at `columns` (int64 ``[R, M]``) as stored; None where nothing is stored."""
        return None if self.tensor is None else self._gather(self.tensor, columns)

    def gather_gradient(self, gradient: Tensor, columns: Tensor) -> Tensor:
        """Gradient of tokens that moved to `columns` (int64 ``[R, N]``); 0 where the column is -1: evicted."""
        return self._gather(gradient, columns.clamp_min(0)).masked_fill_(self._broadcast(columns < 0, gradient), 0)

    def since(self, start: int) -> Tensor:
        """`states` from column `start` on."""
        states = self.states
        return states.narrow(self.dim, start, states.shape[self.dim] - start)

    def masked_since(self, gradient: Tensor, start: int, hidden: Tensor) -> Tensor:
        """Part of a gradient from column `start` on, 0 where `hidden` (bool ``[R, N]``)."""
        part = gradient.narrow(self.dim, start, gradient.shape[self.dim] - start)
        return part.masked_fill(self._broadcast(hidden[:, start:], part), 0)

    @property
    def nbytes(self) -> int:
        """Bytes held, the whole buffer at inference."""
        held = self.tensor if self.storage is None else self.storage
        return sum(one.nbytes for one in (held, self.tail) if one is not None)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the stored tokens alone."""
        return sum(one.nbytes for one in (self.tensor, self.tail) if one is not None)

    def _written(self, new: Tensor, capacity: Callable[[], int | None]) -> TokenBuffer:
        """Write tokens after the stored ones, in place."""
        stored = 0 if self.tensor is None else self.tensor.shape[self.dim]
        stop = stored + new.shape[self.dim]
        storage = self.storage
        if storage is None or storage.shape[self.dim] < stop:
            storage = self._grown(new, max(stop, min(2 * stop, capacity() or 2 * stop)))
        storage.narrow(self.dim, stored, stop - stored).copy_(new)
        return self._view(storage, stop)

    def _view(self, storage: Tensor, count: int) -> TokenBuffer:
        return replace(self, tensor=storage.narrow(self.dim, 0, count), storage=storage)

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

    def _decoded(self, tensor: Tensor) -> Tensor:
        return self.codec.decode(tensor, self.dtype) if self.codec is not None and self.encoded else tensor

    def _joined(self, stored: Tensor | None, new: Tensor) -> Tensor:
        return new if stored is None else torch.cat((stored, new), self.dim)

    def _gather(self, source: Tensor, columns: Tensor) -> Tensor:
        if columns.shape[0] == 1:
            return source.index_select(self.dim, columns[0])
        size = list(source.shape)
        size[self.dim] = columns.shape[1]
        return source.gather(self.dim, self._broadcast(columns, source).expand(size))

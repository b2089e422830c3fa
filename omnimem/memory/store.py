"""Where the records of a stream wait until the way back needs them: on the device, in host memory, on disk."""

from __future__ import annotations

import pickle
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from omnimem.files import explained_disk_errors

ALIGNMENT = 64
"""Bytes at whose multiples a tensor begins in a block."""


class Handle(NamedTuple):
    """A stored record: what it is like without its tensors, and where they are."""

    skeleton: Any
    tensors: Any


class _Slot(NamedTuple):
    """The place of a tensor in a skeleton, and of its bytes in the block of a record."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Store:
    """Keeps records as they are; a record is any nesting of tuples, lists, dicts and dataclasses with tensors."""

    def put(self, record: Any) -> Handle:
        """Store a record and return what `get` takes."""
        return Handle(record, None)

    def prefetch(self, handle: Handle) -> None:
        """Say that this record is wanted next."""

    def get(self, handle: Handle) -> Any:
        """Return a record, once."""
        return handle.skeleton


class _BlockStore(Store):
    """Moves a record as one block of bytes: one copy, and one object however many tensors there are."""

    def put(self, record: Any) -> Handle:
        parts: list[Tensor] = []
        end = 0

        def slot(tensor: Tensor) -> _Slot:
            nonlocal end
            start = end
            parts.append(tensor.detach().contiguous().flatten().view(torch.uint8))
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            if (gap := end - start - tensor.nbytes) > 0:
                parts.append(torch.zeros(gap, dtype=torch.uint8))
            return _Slot(start, tensor.shape, tensor.dtype, tensor.device)

        skeleton = _mapped(record, Tensor, slot)
        device = next((part.device for part in parts if part.device.type != "cpu"), torch.device("cpu"))
        block = torch.cat([part.to(device) for part in parts]) if parts else torch.zeros(0, dtype=torch.uint8)
        # Pickled, because thousands of small objects a step would weigh more than some tensors.
        return Handle(pickle.dumps(skeleton), self._away(block))

    def get(self, handle: Handle) -> Any:
        block = self._back(handle.tensors)

        def tensor(slot: _Slot) -> Tensor:
            size = slot.shape.numel() * slot.dtype.itemsize
            return block[slot.start : slot.start + size].view(slot.dtype).view(slot.shape).to(slot.device)

        return _mapped(pickle.loads(handle.skeleton), _Slot, tensor)

    @abstractmethod
    def _away(self, block: Tensor) -> Any:
        """Put a block away; returns what `_back` takes."""

    @abstractmethod
    def _back(self, kept: Any) -> Tensor:
        """Fetch a block to where it was."""


class HostStore(_BlockStore):
    """Copies records to pinned host memory while the device computes, and fetches the next one early.

    Parameters
    ----------
    device : torch.device
        The accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.Stream(device)
        self._early: tuple[Tensor, Tensor] | None = None

    def _away(self, block: Tensor) -> Tensor:
        host = torch.empty(block.shape, dtype=block.dtype, pin_memory=True)
        self._copies.wait_stream(torch.accelerator.current_stream(self._device))
        with self._copies:
            host.copy_(block, non_blocking=True)
        if block.device.type != "cpu":
            # Its memory may be used again only when the copy is done.
            block.record_stream(self._copies)  # pyright: ignore[reportArgumentType]
        return host

    def prefetch(self, handle: Handle) -> None:
        """Begin to copy a record back."""
        # Allocated where it will be used: blocks of the copying stream would serve nobody else.
        block = torch.empty(handle.tensors.shape, dtype=torch.uint8, device=self._device)
        self._copies.wait_stream(torch.accelerator.current_stream(self._device))
        with self._copies:
            block.copy_(handle.tensors, non_blocking=True)
        block.record_stream(self._copies)  # pyright: ignore[reportArgumentType]
        self._early = handle.tensors, block

    def _back(self, kept: Tensor) -> Tensor:
        if self._early is None or self._early[0] is not kept:
            self.prefetch(Handle(None, kept))
        assert self._early is not None
        (_, block), self._early = self._early, None
        torch.accelerator.current_stream(self._device).wait_stream(self._copies)
        return block


class DiskStore(_BlockStore):
    """Writes records to files, each deleted when it is read.

    Parameters
    ----------
    folder : Path
        An existing folder on a disk that has room for the states of a whole stream.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._written = folder, 0

    def _away(self, block: Tensor) -> Path:
        path = self._folder / f"{self._written}.bin"
        self._written += 1
        with explained_disk_errors(path):
            block.cpu().numpy().tofile(path)
        return path

    def _back(self, kept: Path) -> Tensor:
        block = torch.from_numpy(np.fromfile(kept, dtype=np.uint8))
        kept.unlink()
        return block


def _mapped(tree: Any, leaf: type, change: Callable[[Any], Any]) -> Any:
    """The same nesting with every leaf changed."""
    if isinstance(tree, leaf):
        return change(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_mapped(one, leaf, change) for one in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(one, leaf, change) for one in tree)
    if isinstance(tree, dict):
        return {key: _mapped(one, leaf, change) for key, one in tree.items()}
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{field.name: _mapped(getattr(tree, field.name), leaf, change) for field in fields(tree)})
    return tree

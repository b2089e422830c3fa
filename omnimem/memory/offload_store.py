"""Where the records of a stream are kept for the backward pass: on the device, in host memory, on disk."""

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
"""Byte alignment of tensors in a block."""


class Handle(NamedTuple):
    """A stored record: its structure without tensors, and where the tensors are."""

    structure: Any
    tensors: Any


class _Slot(NamedTuple):
    """Stands for a tensor in a skeleton, and says where its bytes are in the block."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Store:
    """Keeps records on the device. A record is any nesting of tuples, lists, dicts and dataclasses with tensors."""

    def put(self, record: Any) -> Handle:
        """Store a record and return the handle that `fetch` takes."""
        return Handle(record, None)

    def prefetch(self, handle: Handle) -> None:
        """Start to load the record that is fetched next."""

    def fetch(self, handle: Handle) -> Any:
        """Return a record and release it; call once per handle."""
        return handle.structure


class _BlockStore(Store):
    """Offloads a record as one block of bytes: one copy and one object, however many tensors it has."""

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
        return Handle(pickle.dumps(skeleton), self._offload(block))

    def fetch(self, handle: Handle) -> Any:
        block = self._load(handle.tensors)

        def tensor(slot: _Slot) -> Tensor:
            size = slot.shape.numel() * slot.dtype.itemsize
            return block[slot.start : slot.start + size].view(slot.dtype).view(slot.shape).to(slot.device)

        return _mapped(pickle.loads(handle.structure), _Slot, tensor)

    @abstractmethod
    def _offload(self, block: Tensor) -> Any:
        """Move a block off the device; returns what `_load` takes."""

    @abstractmethod
    def _load(self, offloaded: Any) -> Tensor:
        """Move a block back to its device."""


class HostStore(_BlockStore):
    """Copies records to pinned host memory while the device computes, and prefetches the next one.

    Parameters
    ----------
    device : torch.device
        The accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy_stream = torch.Stream(device)
        self._prefetched: tuple[Tensor, Tensor] | None = None

    def _offload(self, block: Tensor) -> Tensor:
        host = torch.empty(block.shape, dtype=block.dtype, pin_memory=True)
        self._copy_stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._copy_stream:
            host.copy_(block, non_blocking=True)
        if block.device.type != "cpu":
            # Its memory may be reused only when the copy is done.
            block.record_stream(self._copy_stream)  # pyright: ignore[reportArgumentType]
        return host

    def prefetch(self, handle: Handle) -> None:
        """Start to copy a record back to the device."""
        # Allocated on the computing stream: the allocator does not reuse memory of the copying stream there.
        block = torch.empty(handle.tensors.shape, dtype=torch.uint8, device=self._device)
        self._copy_stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._copy_stream:
            block.copy_(handle.tensors, non_blocking=True)
        block.record_stream(self._copy_stream)  # pyright: ignore[reportArgumentType]
        self._prefetched = handle.tensors, block

    def _load(self, offloaded: Tensor) -> Tensor:
        if self._prefetched is None or self._prefetched[0] is not offloaded:
            self.prefetch(Handle(None, offloaded))
        assert self._prefetched is not None
        (_, block), self._prefetched = self._prefetched, None
        torch.accelerator.current_stream(self._device).wait_stream(self._copy_stream)
        return block


class DiskStore(_BlockStore):
    """Writes records to files, each deleted when it is read.

    Parameters
    ----------
    folder : Path
        An existing folder on a disk with room for the keys and values of a whole stream.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._written = folder, 0

    def _offload(self, block: Tensor) -> Path:
        path = self._folder / f"{self._written}.bin"
        self._written += 1
        with explained_disk_errors(path):
            block.cpu().numpy().tofile(path)
        return path

    def _load(self, offloaded: Path) -> Tensor:
        block = torch.from_numpy(np.fromfile(offloaded, dtype=np.uint8))
        offloaded.unlink()
        return block


def _mapped(tree: Any, leaf: type, change: Callable[[Any], Any]) -> Any:
    """The same structure with `change` applied to every leaf."""
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

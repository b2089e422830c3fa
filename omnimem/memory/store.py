"""Where the records of a stream wait until the way back needs them: on the device, in host memory, on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omnimem.files import explained_disk_errors


class Handle(NamedTuple):
    """A stored record: its shape without tensors, and where they are."""

    skeleton: Any
    tensors: Any


class _Slot(NamedTuple):
    """The place of a tensor in a skeleton."""

    number: int


class Store:
    """Keeps records on the device; a record is any nesting of tuples, lists, dicts and dataclasses with tensors."""

    def put(self, record: Any) -> Handle:
        """Store a record and return what `get` takes."""
        tensors: list[Tensor] = []

        def slot(tensor: Tensor) -> _Slot:
            tensors.append(tensor)
            return _Slot(len(tensors) - 1)

        skeleton = _mapped(record, Tensor, slot)
        return Handle(skeleton, self._away(tensors))

    def prefetch(self, handle: Handle) -> None:
        """Say that this record is wanted next."""

    def get(self, handle: Handle) -> Any:
        """Return a record, once."""
        tensors = self._back(handle.tensors)
        return _mapped(handle.skeleton, _Slot, lambda slot: tensors[slot.number])

    def _away(self, tensors: list[Tensor]) -> Any:
        return tensors

    def _back(self, kept: Any) -> list[Tensor]:
        return kept


class HostStore(Store):
    """Copies tensors to pinned host memory while the device computes, and fetches the next record early.

    Parameters
    ----------
    device : torch.device
        The accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.Stream(device)
        self._early: tuple[Any, list[Tensor]] | None = None

    def _away(self, tensors: list[Tensor]) -> Any:
        self._copies.wait_stream(torch.accelerator.current_stream(self._device))
        kept = []
        with self._copies:
            for tensor in tensors:
                host = tensor
                if tensor.device.type != "cpu":
                    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                    host.copy_(tensor, non_blocking=True)
                    # Its memory may be used again only when the copy is done.
                    tensor.record_stream(self._copies)  # pyright: ignore[reportArgumentType]
                kept.append((host, tensor.device))
        return kept

    def prefetch(self, handle: Handle) -> None:
        """Begin to copy a record back."""
        with self._copies:
            self._early = handle.tensors, [host.to(device, non_blocking=True) for host, device in handle.tensors]

    def _back(self, kept: Any) -> list[Tensor]:
        if self._early is None or self._early[0] is not kept:
            self.prefetch(Handle(None, kept))
        assert self._early is not None
        (_, tensors), self._early = self._early, None
        present = torch.accelerator.current_stream(self._device)
        present.wait_stream(self._copies)
        for tensor in tensors:
            if tensor.device.type != "cpu":
                tensor.record_stream(present)  # pyright: ignore[reportArgumentType]
        return tensors


class DiskStore(Store):
    """Writes tensors to files, each deleted when it is read.

    Parameters
    ----------
    folder : Path
        An existing folder on a disk that has room for the states of a whole stream.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._written = folder, 0

    def _away(self, tensors: list[Tensor]) -> Any:
        path = self._folder / f"{self._written}.pt"
        self._written += 1
        with explained_disk_errors(path):
            # Cloned, because of a view the whole storage would be written.
            torch.save([tensor.detach().clone() for tensor in tensors], path)
        return path, [tensor.device for tensor in tensors]

    def _back(self, kept: Any) -> list[Tensor]:
        path, devices = kept
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        path.unlink()
        return [tensor.to(device) for tensor, device in zip(tensors, devices, strict=True)]


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

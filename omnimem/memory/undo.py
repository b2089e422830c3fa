"""Undo a step of a layer, and carry the gradient of its memory over it.

The undo log holds only what is found nowhere else: a column stored before a step is afterwards in the memory
(retained), in the margin (evicted, but looked at by the next step; keys and values only) or in the log.

A step does not change a column it retains. The gradient of such a column is that of the same column before the step
plus what the step adds to it. The first part goes around autograd, in the dtype in which gradients are summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from omnimem.memory.columns import COLUMNS, TokenBuffer

if TYPE_CHECKING:
    from omnimem.memory.layer import CompressedLayer, Eviction


def evicted(layer: CompressedLayer, kept: Eviction, before: int) -> tuple[Tensor | None, ...]:
    """Copy the columns that are found nowhere else once a layer is reduced to `kept`: see `Kept.evicted`.

    Parameters
    ----------
    layer : CompressedLayer
        Not yet reduced, its margin already that of `kept`.
    kept : Kept
        What stays.
    before : int
        Number of columns before the step; the log leaves out the others, which are computed again.
    """
    states = features = _missing(_places(_present(layer, kept, "_keys"), before))
    if layer.margin is not None and layer.features is not None:
        features = _missing(_places(_present(layer, kept, "_features"), before))
    return tuple(
        getattr(layer, name).read(which) for name, which in zip(COLUMNS, (states, states, features), strict=True)
    )


def rewind(layer: CompressedLayer, kept: Eviction | None, before: int) -> None:
    """Return the stored columns of a layer to the `before` columns from which the step began that kept these."""
    for i, name in enumerate(COLUMNS):
        stored: TokenBuffer = getattr(layer, name)
        if stored.tensor is None:
            continue
        if kept is None:
            stored.truncate(before)
            continue
        assert kept.evicted is not None
        gone: Any = kept.evicted[i]
        present, retained = _present(layer, kept, name), kept.columns.shape[1]
        place, count = _places(present, before), present.shape[1]
        missing = place < 0
        margin = [getattr(layer.margin, name[1:])] if count > retained else []
        stored.truncate(retained)  # without what was made of merged columns
        stored.rebuild([*margin, gone], torch.where(missing, count + missing.cumsum(1) - 1, place))


def brought(
    layer: CompressedLayer, gradients: dict[str, Tensor], kept: Eviction | None, before: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a step that was just run made or changed: each tensor and its gradient, in the tensor's dtype.

    Parameters
    ----------
    layer : CompressedLayer
        After the step.
    gradients : dict
        Gradients by the names of `CompressedLayer.flowing`.
    kept : Kept or None
        What the step kept.
    before : int
        Number of columns before the step.
    """
    flowing = layer.differentiable_state
    for name, gradient in gradients.items():
        if f"_{name}" in COLUMNS:
            stored: TokenBuffer = getattr(layer, f"_{name}")
            source = _sources(gradient, stored, kept)
            yield stored.brought(gradient, (source >= 0) & (source < before))
        else:
            yield flowing[name], gradient.to(flowing[name].dtype)


def unchanged(
    layer: CompressedLayer, gradients: dict[str, Tensor], kept: Eviction | None, before: int
) -> dict[str, Tensor]:
    """Gradients of the columns that a step retained, where they stood before it; 0 for those it evicted.

    Parameters as for `brought`; `gradients` is used up.
    """
    found: dict[str, Tensor] = {}
    for name in COLUMNS if before > 0 else ():
        if (gradient := gradients.pop(name[1:], None)) is not None:
            stored: TokenBuffer = getattr(layer, name)
            found[name[1:]] = stored.moved_back(gradient, _places(_sources(gradient, stored, kept), before))
    return found


def _present(layer: CompressedLayer, kept: Eviction, name: str) -> Tensor:
    """Columns ``[R, A]`` before the compression that are still held after it: in the memory, then in the margin."""
    if layer.margin is None or kept.margin is None or name == "_features":
        return kept.retained
    return torch.cat((kept.retained, kept.margin), dim=1)


def _sources(gradient: Tensor, stored: TokenBuffer, kept: Eviction | None) -> Tensor:
    """Column before the compression ``[R, M]`` of each column after it; -1 for padding and merged ones."""
    count = gradient.shape[stored.dim]
    if kept is None:
        return torch.arange(count, device=gradient.device).expand(len(gradient), -1)
    return torch.nn.functional.pad(kept.retained, (0, count - kept.columns.shape[1]), value=-1)


def _places(present: Tensor, before: int) -> Tensor:
    """Index in `present` (int64 ``[R, A]``) of each of the first `before` columns ``[R, N]``, -1 for a missing one."""
    rows, count = present.shape
    target = torch.where((present >= 0) & (present < before), present, before)
    found = torch.full((rows, before + 1), -1, device=present.device)
    found.scatter_(1, target, torch.arange(count, device=present.device).expand(rows, -1))
    return found[:, :before]


def _missing(place: Tensor) -> Tensor:
    """Columns ``[R, G]`` without a place, ascending; rows with fewer are filled up with others."""
    missing = place < 0
    return torch.sort((~missing).to(torch.int8), dim=1, stable=True).indices[:, : int(missing.sum(1).max())]

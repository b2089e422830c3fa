"""Undo a step of a layer, and carry the gradient of its tokens over the step.

The undo log stores only what is found nowhere else: a token stored before a step is afterwards in the state
(retained), in the margin (evicted, but still used by the next step; keys and values only) or in the log. Where keys and
values are encoded, the log holds their bytes, and the margin, which holds decoded states, restores nothing.

A step does not change a token it retains. Its gradient before the step is its gradient after the step plus
what the step adds to it. The first part bypasses autograd, in the dtype in which gradients are summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from omnimem.memory.eviction import Eviction
from omnimem.memory.state import BUFFERS, LayerState
from omnimem.memory.token_buffer import TokenBuffer

LayerGradients = dict[str, Tensor]
"""Gradients by the names of `differentiable_state`."""


def differentiable_state(state: LayerState, selection: bool, scores: bool) -> dict[str, Tensor]:
    """Tensors of a state through which gradients flow from step to step; keys and values as floats, settled.

    Parameters
    ----------
    state : LayerState
        Any state.
    selection : bool
        Whether a gradient reaches the selection: then features, gates of the margin and bias are among them.
    scores : bool
        Whether it also goes through the attention scores.
    """
    found = {"keys": state.keys.settled_states, "values": state.values.settled_states}
    if selection:
        found["features"] = state.features.settled_states
        found["gates"] = None if state.margin is None else state.margin.gates
        found["bias"] = state.bias
    if scores:
        found["attention_scores"] = state.attention_scores
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def with_tensors(state: LayerState, tensors: dict[str, Tensor]) -> LayerState:
    """The state with some of its differentiable tensors replaced."""
    changes: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name in BUFFERS:
            changes[name] = getattr(state, name).holding(tensor)
        elif name == "gates":
            assert state.margin is not None
            changes["margin"] = state.margin._replace(gates=tensor)
        else:
            changes[name] = tensor
    return replace(state, **changes)


def log_of(state: LayerState, eviction: Eviction, start: int) -> tuple[Tensor | None, ...]:
    """Copy the tokens that `apply` would lose: see `Eviction.log`.

    Parameters
    ----------
    state : LayerState
        Before `apply`, its margin already that of `eviction`.
    eviction : Eviction
        What is retained.
    start : int
        Tokens stored before the step; the others are recomputed.
    """
    states = features = _missing(_position_in(_available(state, eviction, "keys"), start))
    if state.margin is not None and state.features.tensor is not None:
        features = _missing(_position_in(_available(state, eviction, "features"), start))
    return tuple(
        getattr(state, name).read(columns) for name, columns in zip(BUFFERS, (states, states, features), strict=True)
    )


def undo(state: LayerState, eviction: Eviction | None, before: LayerState) -> LayerState:
    """Return the state from which a step began.

    Parameters
    ----------
    state : LayerState
        After the step and its compression.
    eviction : Eviction or None
        Result of the compression, with its log; None if there was none.
    before : LayerState
        Metadata and counters from before the step (see `LayerState.without_tokens`); the tokens are restored here.
    """
    buffers = {name: _restored(state, eviction, name, len(before)) for name in BUFFERS}
    return replace(before, **buffers)


def step_outputs(
    state: LayerState, tensors: dict[str, Tensor], gradients: LayerGradients, eviction: Eviction | None, start: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor that a recomputed step made or changed, with its gradient in the tensor's dtype.

    Parameters
    ----------
    state : LayerState
        After the step.
    tensors : dict
        Its `differentiable_state`.
    gradients : dict
        Gradients of these tensors.
    eviction : Eviction or None
        What the step retained.
    start : int
        Tokens stored before the step.
    """
    for name, gradient in gradients.items():
        if name not in BUFFERS:
            yield tensors[name], gradient.to(tensors[name].dtype)
            continue
        buffer: TokenBuffer = getattr(state, name)
        sources = _sources(gradient, buffer, eviction)
        old = (sources >= 0) & (sources < start)
        # Old tokens come first; where one row has more of them than another, their gradient is set to 0.
        first_new = int(old.sum(1).min())
        output = buffer.since(first_new)
        yield output, buffer.masked_since(gradient, first_new, old).to(output.dtype)


def carried_gradients(
    state: LayerState, gradients: LayerGradients, eviction: Eviction | None, start: int
) -> LayerGradients:
    """Gradients of retained tokens at the columns where they stood before the step; 0 for those it evicted.

    Parameters as for `step_outputs`; `gradients` is emptied.
    """
    found: LayerGradients = {}
    for name in BUFFERS if start > 0 else ():
        if (gradient := gradients.pop(name, None)) is not None:
            buffer: TokenBuffer = getattr(state, name)
            found[name] = buffer.gather_gradient(gradient, _position_in(_sources(gradient, buffer, eviction), start))
    return found


def _restored(state: LayerState, eviction: Eviction | None, name: str, start: int) -> TokenBuffer:
    """One buffer with the `start` tokens from before the step."""
    buffer: TokenBuffer = getattr(state, name)
    if buffer.tensor is None:
        return buffer.empty
    if eviction is None:  # the tokens of the step may still be in the tail
        return buffer.holding(buffer.tensor.narrow(buffer.dim, 0, start))
    assert eviction.log is not None
    logged: Any = eviction.log[BUFFERS.index(name)]
    available, retained = _available(state, eviction, name), eviction.columns.shape[1]
    position, count = _position_in(available, start), available.shape[1]
    missing = position < 0
    margin = [getattr(state.margin, name)] if count > retained else []
    # Without merged tokens, which follow the retained ones.
    parts = [buffer.tensor.narrow(buffer.dim, 0, retained), *margin, logged]
    columns = torch.where(missing, count + missing.cumsum(1) - 1, position)
    return buffer.holding(buffer.holding(torch.cat(parts, buffer.dim)).read(columns))


def _available(state: LayerState, eviction: Eviction, name: str) -> Tensor:
    """Columns ``[R, A]`` before the compression that are still held after it: in the state, then in the margin."""
    encoded = getattr(state, name).codec is not None
    if state.margin is None or eviction.margin is None or name == "features" or encoded:
        return eviction.retained
    return torch.cat((eviction.retained, eviction.margin), dim=1)


def _sources(gradient: Tensor, buffer: TokenBuffer, eviction: Eviction | None) -> Tensor:
    """Column before the compression ``[R, M]`` of each column after it; -1 for padding and merged tokens."""
    count = gradient.shape[buffer.dim]
    if eviction is None:
        return torch.arange(count, device=gradient.device).expand(len(gradient), -1)
    return torch.nn.functional.pad(eviction.retained, (0, count - eviction.columns.shape[1]), value=-1)


def _position_in(available: Tensor, start: int) -> Tensor:
    """Index in `available` (int64 ``[R, A]``) of the columns 0 to `start` - 1: ``[R, start]``, -1 for a missing one."""
    rows, count = available.shape
    target = torch.where((available >= 0) & (available < start), available, start)
    found = torch.full((rows, start + 1), -1, device=available.device)
    found.scatter_(1, target, torch.arange(count, device=available.device).expand(rows, -1))
    return found[:, :start]


def _missing(position: Tensor) -> Tensor:
    """Columns ``[R, K]`` whose position is -1, ascending; rows with fewer are filled up with other columns."""
    missing = position < 0
    return torch.sort((~missing).to(torch.int8), dim=1, stable=True).indices[:, : int(missing.sum(1).max())]

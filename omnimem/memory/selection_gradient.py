"""How a gradient reaches the selection in training: wrapped around `select` and `apply`, absent at inference.

Gates g (`omnimem.selection.gates`) say how close a token is to being retained, and pass a gradient to its score.

straight_through
    The forward pass is the hard selection of inference. Evicted tokens are kept for one more chunk as the *margin*
    (`omnimem.memory.margin`), whose term has the value zero and a gradient.
soft
    The next-highest-scoring tokens are retained beyond the budget, and Σ log g over the chunks so far is added to the
    attention logits of every token: a forward pass of its own, close to that of inference at a low temperature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from omnimem.budget import LayerBudget
from omnimem.errors import OmniMemError
from omnimem.memory.eviction import Eviction
from omnimem.memory.margin import Margin
from omnimem.memory.rotary import KeyRotation
from omnimem.memory.state import LayerState
from omnimem.modality import EVICTABLE, TEXT
from omnimem.selection.gates import gates


@dataclass(frozen=True)
class SelectionGradient:
    """Settings of the gradient.

    Attributes
    ----------
    form : {"straight_through", "soft"}
        See the module.
    temperature : float
        T of the gates; low values (0.3) train best.
    margin : int or None
        Evicted tokens of a layer that get a gradient, those nearest to being retained; None: all of them, or in the
        soft form at most the number of new tokens.
    gradient_scale : float
        Weight c of the zero-valued term in `omnimem.memory.margin`, or of the gradient of the soft gates (1: exact).
        16 trains best in `tests/benchmarks/streaming_recall.py`.
    threshold : {"boundary", "bisection"}
        See `omnimem.selection.gates`.
    through_attention : bool
        Whether the gradient also goes through the attention scores (useful with a large λ).
    """

    form: Literal["straight_through", "soft"] = "straight_through"
    temperature: float = 0.3
    margin: int | None = None
    gradient_scale: float = 16.0
    threshold: Literal["boundary", "bisection"] = "boundary"
    through_attention: bool = False

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("form", self.form in ("straight_through", "soft"), "straight_through or soft"),
            ("temperature", self.temperature > 0, "above 0"),
            ("margin", self.margin is None or self.margin >= 1, "at least 1"),
            ("gradient_scale", self.gradient_scale >= 0, "at least 0"),
            ("threshold", self.threshold in ("boundary", "bisection"), "boundary or bisection"),
        ):
            if not holds:
                raise OmniMemError(f"selection gradient: {name} must be {rule}, got {getattr(self, name)!r}")


class EvictionWithGradient(NamedTuple):
    """A state and an eviction that carry the gradient of a selection.

    Attributes
    ----------
    state : LayerState
        With the margin, or with the bias of the soft form.
    eviction : Eviction
        With its margin columns; in the soft form it retains them too.
    statistics : Tensor or None
        ``[5]``: see `gate_statistics`; None where the eviction repeats a logged one.
    """

    state: LayerState
    eviction: Eviction
    statistics: Tensor | None


def attach_selection_gradient(
    state: LayerState,
    eviction: Eviction,
    score: Tensor,
    gradient: SelectionGradient,
    budget: LayerBudget,
    start: int,
    rotation: KeyRotation,
) -> EvictionWithGradient:
    """Attach the gradient of the selection to a state that is about to be reduced by `apply`.

    Parameters
    ----------
    state : LayerState
        Before the eviction.
    eviction : Eviction
        The new eviction or, when a step is recomputed, the logged one.
    score : Tensor
        ``[R, N]`` with its graph.
    gradient, budget
        Settings and budget of the layer.
    start : int
        Tokens stored before the step.
    rotation : KeyRotation
        How the layer stores its keys.
    """
    assert state.metadata is not None
    metadata = state.metadata
    media = (metadata.modality != TEXT) & metadata.valid
    retained = eviction.mask(len(state))
    evicted = media & ~retained
    gate = torch.zeros_like(score)
    for name, kind in EVICTABLE.items():
        competing = (metadata.modality == kind) & metadata.valid
        gate = gate + gates(score, competing, getattr(budget, name), gradient.temperature, gradient.threshold)
    statistics = None
    if eviction.margin is None:
        statistics = gate_statistics(gate.detach(), retained & (metadata.modality != TEXT), evicted)
        eviction = _choose_margin(eviction, gate.detach(), evicted, gradient, len(state) - start)
    assert eviction.margin is not None
    if gradient.form == "soft":
        state = replace(state, bias=_soft_bias(state, gate, media, gradient.gradient_scale))
    elif eviction.margin.shape[1] > 0:
        state = replace(state, margin=_margin_of(state, gate * evicted, eviction.margin, gradient, rotation))
    return EvictionWithGradient(state, eviction, statistics)


def gate_statistics(gate: Tensor, retained: Tensor, evicted: Tensor) -> Tensor:
    """Sum of the gates of retained and of evicted tokens, number of undecided ones (0.1 < g < 0.9), and both counts."""
    undecided = ((gate > 0.1) & (gate < 0.9) & (retained | evicted)).sum()
    return torch.stack([(gate * retained).sum(), (gate * evicted).sum(), undecided, retained.sum(), evicted.sum()])


def soft_attention_inputs(state: LayerState, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries and keys whose product contains the bias of the soft form, in eight more channels (what kernels need)."""
    bias = state.padded_bias()
    if bias is None:
        return query, key
    channel = (bias / scale).to(key.dtype)[:, None, :, None].expand(-1, key.shape[1], -1, 1)
    pad = torch.nn.functional.pad
    return pad(pad(query, (0, 1), value=1.0), (0, 7)), pad(torch.cat((key, channel), -1), (0, 7))


def _choose_margin(
    eviction: Eviction, gate: Tensor, evicted: Tensor, gradient: SelectionGradient, new_tokens: int
) -> Eviction:
    """Pick the evicted tokens with the largest gates; the soft form retains them."""
    soft = gradient.form == "soft"
    size = int(evicted.sum(1).max())
    if soft:
        size = min(size, new_tokens)
    nearest = gate.masked_fill(~evicted, -1)
    columns = nearest.topk(min(size, gradient.margin or size), dim=1).indices.sort(1).values
    if soft:
        near = torch.zeros_like(evicted).scatter(1, columns, True) & evicted
        eviction = Eviction.from_mask(eviction.mask(evicted.shape[1]) | near, eviction.merged)
    return eviction._replace(margin=columns)


def _margin_of(
    state: LayerState, gate: Tensor, columns: Tensor, gradient: SelectionGradient, rotation: KeyRotation
) -> Margin:
    assert state.metadata is not None
    position_ids = state.metadata.position_ids.gather(1, columns[..., None].expand(-1, -1, 3))
    keys = rotation.post_rope(state.keys.states_at(columns).detach(), position_ids)
    values = state.values.states_at(columns).detach()
    return Margin(keys, values, gate.gather(1, columns), gradient.gradient_scale)


def _soft_bias(state: LayerState, gate: Tensor, media: Tensor, gradient_scale: float) -> Tensor:
    """Add log g to the bias so far; text has none."""
    log_gate = torch.where(media, gate, 1.0).clamp_min(torch.finfo(gate.dtype).tiny).log()
    log_gate = log_gate.detach() + gradient_scale * (log_gate - log_gate.detach())
    bias = state.padded_bias()
    return log_gate if bias is None else bias + log_gate

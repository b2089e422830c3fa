"""Which tokens a layer retains and evicts, and how that changes its state.

`select` decides from scores which tokens are retained, `apply` reduces the state to them. Both are pure functions of
`LayerState`; training wraps them (`omnimem.memory.selection_gradient`) and undoes them (`omnimem.memory.undo`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from omnimem.budget import LayerBudget
from omnimem.memory.rotary import KeyRotation
from omnimem.memory.state import BUFFERS, LayerState
from omnimem.modality import EVICTABLE
from omnimem.selection.base import Candidates, MergedTokens, SelectionMethod
from omnimem.token_metadata import count_tokens


class Eviction(NamedTuple):
    """The result of a selection in one layer: which columns it retains.

    Attributes
    ----------
    columns : Tensor
        int64 ``[R, M]``: retained columns, in stored order; 0 where a shorter sample is padded.
    valid : Tensor
        bool ``[R, M]``: which of them are real.
    merged : MergedTokens or None
        Tokens made of evicted ones; they are appended after the retained ones.
    margin : Tensor or None
        int64 ``[R, M]``: in training, the evicted columns that the next step still uses; in the soft form, those it
        retains beyond the budget.
    log : tuple or None
        Undo log: keys, values and features (None where there are none) of evicted tokens from before the step that are
        not in the margin (features also of those in it: `Margin` holds only keys and values). Encoded keys and values
        are logged as bytes, those in the margin as well.
    """

    columns: Tensor
    valid: Tensor
    merged: MergedTokens | None = None
    margin: Tensor | None = None
    log: tuple[Tensor | None, ...] | None = None

    @classmethod
    def from_mask(cls, retain: Tensor, merged: MergedTokens | None = None) -> Eviction:
        """Retain the tokens marked in a bool mask ``[R, N]``."""
        lengths = retain.sum(1)
        width = int(lengths.max())
        # A stable sort of "evicted" puts the retained columns first and leaves them in stored order.
        columns = torch.sort((~retain).to(torch.int8), dim=1, stable=True).indices[:, :width]
        valid = torch.arange(width, device=retain.device)[None] < lengths[:, None]
        return cls(columns.masked_fill(~valid, 0), valid, None if merged is None else _without_empty_slots(merged))

    @property
    def retained(self) -> Tensor:
        """int64 ``[R, M]``: retained columns, -1 where a shorter sample is padded."""
        return self.columns.masked_fill(~self.valid, -1)

    def mask(self, length: int) -> Tensor:
        """Bool ``[R, length]``: which of the columns before the eviction are retained."""
        retained = torch.zeros(len(self.columns), length, dtype=torch.int8, device=self.columns.device)
        # A maximum, because padding points at column 0.
        return retained.scatter_reduce_(1, self.columns, self.valid.to(torch.int8), "amax").bool()


def over_budget(token_counts: Sequence[dict[str, int]], budget: LayerBudget) -> bool:
    """Whether some sample stores more tokens of a modality than its budget."""
    return any(sample[name] > getattr(budget, name) for sample in token_counts for name in EVICTABLE)


@torch.no_grad()
def select(
    state: LayerState, method: SelectionMethod, candidates: Candidates | None = None, score: Tensor | None = None
) -> Eviction | None:
    """Decide what is retained; None where the state does not change.

    Parameters
    ----------
    state : LayerState
        What is stored.
    method : SelectionMethod
        Turns scores into a retained set.
    candidates, score : optional
        The method's input and its score ``[R, N]``. If omitted, only padding is removed: the layer
        is not over budget.
    """
    if candidates is not None and score is not None:
        return Eviction.from_mask(*method.select(candidates, score))
    assert state.metadata is not None
    return None if bool(state.metadata.valid.all()) else Eviction.from_mask(state.metadata.valid)


def apply(state: LayerState, eviction: Eviction, budget: LayerBudget | None, rotation: KeyRotation) -> LayerState:
    """Reduce every stored tensor to the retained tokens and append the merged ones.

    Parameters
    ----------
    state : LayerState
        Before the eviction, settled; at inference its buffers are overwritten.
    eviction : Eviction
        What is retained.
    budget : LayerBudget or None
        The budget that the eviction enforces; None where budgets are ignored.
    rotation : KeyRotation
        How the layer stores its keys.
    """
    assert state.metadata is not None
    merged = None if eviction.merged is None else merge_states(state, eviction.merged, rotation)
    bias, scores = state.padded_bias(), state.attention_scores
    metadata = state.metadata.gather(eviction.columns, eviction.valid)
    buffers = {name: getattr(state, name).compact(eviction.columns) for name in BUFFERS}
    if eviction.merged is not None and merged is not None:
        metadata = metadata.append(eviction.merged.metadata)
        for name, states in zip(("keys", "values"), merged, strict=True):
            buffers[name] = buffers[name].append(states, lambda: None).settle(lambda: None)
    counts = state.token_counts
    if bias is not None:  # the soft gradient retains tokens beyond the budget
        counts = tuple(count_tokens(metadata.modality, metadata.valid))
    elif budget is not None:
        limits = {name: getattr(budget, name) for name in EVICTABLE}
        counts = tuple({name: min(n, limits.get(name, n)) for name, n in sample.items()} for sample in counts)
    return replace(
        state,
        **buffers,
        metadata=metadata,
        token_counts=counts,
        attention_scores=None if scores is None else scores.gather(1, eviction.columns),
        bias=None if bias is None else bias.gather(1, eviction.columns),
    )


def merge_states(state: LayerState, merged: MergedTokens, rotation: KeyRotation) -> tuple[Tensor, Tensor]:
    """Keys and values ``[R, G, S, D]`` of merged tokens: weighted means, of keys without their rotation."""
    assert state.metadata is not None
    keys = rotation.unrotated(state.keys.states, state.metadata.position_ids)
    # Target -1 (merged nowhere) is counted as one more slot, which is then dropped.
    slots = torch.nn.functional.one_hot(merged.into + 1, merged.metadata.index.shape[1] + 1)[..., 1:]
    weights = (slots * merged.weight[..., None])[:, None].to(torch.promote_types(keys.dtype, torch.float32))
    keys, values = (
        (weights.transpose(-1, -2) @ states.to(weights.dtype)).to(states.dtype)
        for states in (keys, state.values.states)
    )
    return rotation.stored(keys, merged.metadata.position_ids), values


def _without_empty_slots(merged: MergedTokens) -> MergedTokens | None:
    """Drop merged tokens that no row has: batch size 1 runs without a padding mask."""
    filled = merged.metadata.valid.any(0)
    if bool(filled.all()):
        return merged
    slots = filled.nonzero()[:, 0]
    if len(slots) == 0:
        return None
    into = torch.where(merged.into < 0, -1, (filled.cumsum(0) - 1)[merged.into.clamp_min(0)])
    metadata = merged.metadata.gather(slots.expand(len(into), -1), merged.metadata.valid[:, slots])
    return MergedTokens(into, merged.weight, metadata)

"""One layer of the memory: keys and values of text, visual and audio positions, and what selection needs of them.

A step announces its positions (`begin`), appends their states (`update`) and reports what it saw (`observe_…`);
`decide` then says what stays and `take` keeps it. How tensors are held is `omnimem.memory.columns`.

Stored tensors have one row a sample; where every key-value head keeps its own positions, one row a sample and head,
so that to everything below `update` a head is a sample of one head.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from omnimem.budget import LayerBudget
from omnimem.memory.columns import COLUMNS, TokenBuffer
from omnimem.memory.margin import Margin, SelectionGradient
from omnimem.memory.rotary import Rotary
from omnimem.memory.table import TokenMetadata, count
from omnimem.memory.undo import evicted
from omnimem.modality import EVICTABLE, KINDS, TEXT
from omnimem.selection.base import AttentionScoreSpec, Candidates, MergedTokens, Probe, SelectionMethod
from omnimem.selection.gates import gates

STATE = (
    "metadata", "valid", "ragged", "attention_scores", "counts", "is_initialized", "margin", "_settled", "_before",
    "_new_mass", "_active", "bias",
)  # fmt: skip
"""Attributes that, beside the stored columns, make up the state of a layer between two steps."""


class Eviction(NamedTuple):
    """What a compression kept.

    Attributes
    ----------
    columns : Tensor
        int64 ``[R, M]``: columns that stayed, in stored order; 0 where a shorter sample is padded.
    valid : Tensor
        bool ``[R, M]``: which of them are real.
    merged : Merged or None
        What was made of the others and stands behind them.
    margin : Tensor or None
        int64 ``[R, M]``: columns that went, but that the next step still looks at (`SelectionGradient`).
    evicted : tuple or None
        Keys, values and features (None where there are none) of the columns from before the step that are neither
        retained nor in the margin, where a step is to be undone.
    """

    columns: Tensor
    valid: Tensor
    merged: MergedTokens | None = None
    margin: Tensor | None = None
    evicted: tuple[Tensor | None, ...] | None = None

    @property
    def retained(self) -> Tensor:
        """int64 ``[R, M]``: the same columns, -1 where a shorter sample is padded."""
        return self.columns.masked_fill(~self.valid, -1)

    @classmethod
    def of(cls, keep: Tensor, merged: MergedTokens | None = None) -> Eviction:
        """From a bool mask ``[R, N]``."""
        lengths = keep.sum(1)
        width = int(lengths.max())
        # A stable sort of "dropped" puts the kept columns first and leaves them in stored order.
        columns = torch.sort((~keep).to(torch.int8), dim=1, stable=True).indices[:, :width]
        valid = torch.arange(width, device=keep.device)[None] < lengths[:, None]
        return cls(columns.masked_fill(~valid, 0), valid, None if merged is None else _filled(merged))


def _filled(merged: MergedTokens) -> MergedTokens | None:
    """Without the new positions that no row has: a single stream is never masked, so it must hold no padding."""
    filled = merged.metadata.valid.any(0)
    if bool(filled.all()):
        return merged
    slots = filled.nonzero()[:, 0]
    if len(slots) == 0:
        return None
    into = torch.where(merged.into < 0, -1, (filled.cumsum(0) - 1)[merged.into.clamp_min(0)])
    table = merged.metadata.gather(slots.expand(len(into), -1), merged.metadata.valid[:, slots])
    return MergedTokens(into, merged.weight, table)


class CompressedLayer(CacheLayerMixin):
    """Key-value states of one decoder layer, bounded by its budget.

    Parameters
    ----------
    index, layers : int
        Number of the layer, and how many there are.
    budget : LayerBudget
        Visual and audio positions that stay after a compression.
    method : SelectionMethod
        Scores the candidates and says what it needs to observe.
    gradient : SelectionGradient, optional
        Under autograd, how gradients reach the selection.
    """

    is_sliding = False
    is_compileable = False

    def __init__(
        self,
        index: int,
        layers: int,
        budget: LayerBudget,
        method: SelectionMethod,
        gradient: SelectionGradient | None = None,
    ) -> None:
        super().__init__()
        self.index, self.layers = index, layers
        self.budget = budget
        self.method = method
        self.gradient = gradient
        self.rotary: Rotary | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything, buffers included."""
        self._keys, self._values, self._features = TokenBuffer(2), TokenBuffer(2), TokenBuffer(1)
        # None until the first step, a TokenMetadata from then on.
        self.metadata: Any = None
        self.attention_scores: Tensor | None = None
        self.counts: list[dict[str, int]] = []
        self.is_initialized = False
        self.keys: Any = None
        self.values: Any = None
        self.margin: Margin | None = None
        self.bias: Tensor | None = None
        # Gates of those that stayed, of those that went, how many were in between, how many there were of each.
        self.gate_sums: Tensor | None = None
        self._settled = self._before = 0
        # Of the step under way: which columns are real, what it is to report, what it has reported.
        self.valid: Tensor | None = None
        self.ragged = False
        self.probe: Probe | None = None
        self.shown: Tensor | None = None
        self._probed: list[Tensor] = []
        self._observing = False
        self._announced: TokenMetadata | None = None
        self._new_features: Tensor | None = None
        self._new_mass: Tensor | None = None
        self._active: Tensor | None = None

    # ---- one forward step -------------------------------------------------------------------------------

    def begin(self, new: TokenMetadata, counts: list[dict[str, int]], ragged: bool, observe: bool) -> None:
        """Announce the positions of the coming step.

        Parameters
        ----------
        new : TokenMetadata
            The T new positions, one row a sample.
        counts : list of dict
            How many of them are text, visual and audio, for each sample.
        ragged : bool
            Whether any column, stored or new, may be padding.
        observe : bool
            Whether the step should report what selection needs to see.
        """
        self.accumulate()
        self._observing, self._new_features, self.ragged = observe, None, ragged
        self._before = 0 if self.metadata is None else len(self.metadata)
        before = self.counts or [dict.fromkeys(KINDS, 0)] * len(counts)
        self.counts = [{name: a[name] + b[name] for name in KINDS} for a, b in zip(before, counts, strict=True)]
        self._announced = new
        self.valid = self._active = None
        if ragged:
            self._active = new.valid.any(1, keepdim=True)
            self.valid = new.valid
            if self.metadata is not None:
                # The heads of a sample hold equally many positions, so its padding is that of any of them.
                self.valid = torch.cat((self.metadata.valid[:: self._rows(new)], new.valid), dim=1)

    def observe_hidden(self, hidden: Tensor) -> None:
        """Take the layer's input hidden states ``[B, T, C]`` of the new positions."""
        if self.method.stores_features:
            self._new_features = self.method.features(hidden if self.learning else hidden.detach(), self.index)

    @property
    def wants_mass(self) -> AttentionScoreSpec | None:
        """Attention mass this step should report, None for none."""
        return self.method.attention_scores if self._observing else None

    def observe_mass(self, mass: Tensor) -> None:
        """Take the attention mass ``[B, N + T]`` (``[B, G, N + T]``) the step gave to retained and new positions."""
        self._new_mass = (mass if self.learns_attention else mass.detach()).flatten(0, -2)

    def reserve(self, columns: int) -> None:
        """Make room for a probe of so many positions; what a scratch appends past the buffer is copied every time."""
        self._keys.reserve(columns)
        self._values.reserve(columns)
        self._show()

    def observe_probe(self, attention: Tensor) -> None:
        """Take the attention ``[B, N]`` of a probe to what is stored."""
        self._probed.append(attention)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append the states ``[B, G, T, D]`` of the announced positions and return all ``[B, G, N + T, D]``."""
        if self._announced is None:
            raise RuntimeError(
                "a CompressedCache needs its hooks: call omnimem.memory.attach(language_model) before using it"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        heads, step = key_states.shape[1:3]
        new, self._announced = self._announced, None
        if self.method.per_head:
            new = new.repeat(heads)
            key_states, value_states = key_states.flatten(0, 1)[:, None], value_states.flatten(0, 1)[:, None]
        if self._unrotated:
            key_states = self._rotation.unrotate(key_states, new.position_ids)

        def bound() -> int | None:
            """Columns there can ever be after a step of this length; None without a budget."""
            if self.method.keeps_everything:
                return None
            return self.budget.total + max(sample["text"] for sample in self.counts) + step

        self._keys.append(key_states, bound)
        self._values.append(value_states, bound)
        if self._new_features is not None:
            self._features.append(self._new_features, bound)
        self.metadata = new if self.metadata is None else self.metadata.append(new)
        self._show()
        keys, values = self.rotated_keys(), self.values
        if self.method.per_head:
            return keys[:, 0].unflatten(0, (-1, heads)), values[:, 0].unflatten(0, (-1, heads))
        return keys, values

    # ---- compression ------------------------------------------------------------------------------------

    @property
    def learning(self) -> bool:
        """Whether a gradient is to reach the selection."""
        return self.gradient is not None

    @property
    def learns_attention(self) -> bool:
        """Whether it is to go through the attention mass as well."""
        return self.gradient is not None and self.gradient.through_attention

    def accumulate(self) -> None:
        """Fold the mass observed in the last step into the mass of every position."""
        with nullcontext() if self.learns_attention else torch.no_grad():
            self._accumulate()

    def _accumulate(self) -> None:
        if self.attention_scores is None:
            self.attention_scores, self._new_mass = self._new_mass, None
            return
        # Positions that came in a step that was not observed (text) start without mass.
        missing = len(self.metadata) - self.attention_scores.shape[1]
        before = torch.nn.functional.pad(self.attention_scores, (0, missing))
        if self._new_mass is None:
            self.attention_scores = before
            return
        self.attention_scores = self.method.accumulate(self.attention_scores, self._new_mass)
        if self._active is not None:
            # A sample that had no query in this step has not had a step.
            active = self._active.repeat_interleave(len(before) // len(self._active), dim=0)
            self.attention_scores = torch.where(active, self.attention_scores, before)
        self._new_mass = None

    @property
    def over_budget(self) -> bool:
        """Whether some sample holds more of a modality than its budget."""
        return not self.method.keeps_everything and any(
            sample[name] > getattr(self.budget, name) for sample in self.counts for name in EVICTABLE
        )

    @property
    def features(self) -> Tensor | None:
        """Stored features ``[B, N, F]``."""
        return self._features.tensor

    def candidates(self) -> Candidates:
        """Everything the selection method may look at; only what the selection learns from keeps its graph."""
        return Candidates(
            layer=self.index,
            layers=self.layers,
            budget=self.budget,
            old=self._settled,
            values=self.values.detach(),
            keys=self.rotated_keys().detach() if self.method.reads_keys else None,
            metadata=self.metadata,
            attention_scores=self.attention_scores,
            probes=tuple(self._probed),
            features=self.features,
        )

    @torch.no_grad()
    def decide(self, candidates: Candidates | None = None, score: Tensor | None = None) -> Eviction | None:
        """What stays, given scores; without them all that is real. None where nothing moves."""
        if candidates is not None and score is not None and self.over_budget:
            return Eviction.of(*self.method.choose(candidates, score))
        # Nothing to evict; only the padding between a shorter sample and the step is squeezed out.
        return Eviction.of(self.metadata.valid) if self.ragged and not bool(self.metadata.valid.all()) else None

    def take(self, kept: Eviction | None, score: Tensor | None = None, rewindable: bool = False) -> Eviction | None:
        """Reduce every stored tensor to what is kept; given scores, hold back some of what goes (`margin`).

        Returns `kept` with the columns that were held back (given them, the same ones are), and with what went, if
        the step is to be `rewindable`.
        """
        self._probed = []
        self.margin = None
        if kept is not None:
            if score is not None:
                kept = self._hold_back(kept, score)
            if rewindable:
                kept = kept._replace(evicted=evicted(self, kept, self._before))
            merged = None if kept.merged is None else self._merge(kept.merged)
            self.bias = None if self.bias is None else self._padded_bias.gather(1, kept.columns)
            for stored in (self._keys, self._values, self._features):
                if stored.tensor is not None:
                    stored.compact(kept.columns)
            self.metadata = self.metadata.gather(kept.columns, kept.valid)
            self.attention_scores = (
                None if self.attention_scores is None else self.attention_scores.gather(1, kept.columns)
            )
            if kept.merged is not None and merged is not None:
                self._keys.append(merged[0], lambda: None)
                self._values.append(merged[1], lambda: None)
                self.metadata = self.metadata.append(kept.merged.metadata)
            if self.bias is not None:
                self.counts = count(self.metadata.modality, self.metadata.valid)
            elif not self.method.keeps_everything:
                limits = {name: getattr(self.budget, name) for name in EVICTABLE}
                self.counts = [{k: min(n, limits.get(k, n)) for k, n in sample.items()} for sample in self.counts]
        self._settled = len(self.metadata)
        self._show()
        return kept

    def _hold_back(self, kept: Eviction, score: Tensor) -> Eviction:
        """Let gates learn from what goes: as the margin of the next step, or in the soft form by keeping it."""
        assert self.gradient is not None
        table, gradient = self.metadata, self.gradient
        soft = gradient.form == "soft"
        gone = (table.modality != TEXT) & table.valid & ~self._stays(kept)
        gate = torch.zeros_like(score)
        for name, kind in EVICTABLE.items():
            competing = (table.modality == kind) & table.valid
            gate = gate + gates(score, competing, getattr(self.budget, name), gradient.temperature, gradient.threshold)
        if kept.margin is None:
            self._note(gate.detach(), self._stays(kept) & (table.modality != TEXT), gone)
            places = int(gone.sum(1).max())
            if soft:
                places = min(places, len(table) - self._before)
            nearest = gate.detach().masked_fill(~gone, -1)
            columns = nearest.topk(min(places, gradient.margin or places), dim=1).indices.sort(1).values
            if soft:
                near = torch.zeros_like(gone).scatter(1, columns, True) & gone
                kept = Eviction.of(self._stays(kept) | near, kept.merged)
            kept = kept._replace(margin=columns)
        if soft:
            self._soften(gate)
        elif kept.margin is not None and kept.margin.shape[1] > 0:
            self._set_margin(gate * gone, kept.margin)
        return kept

    def _set_margin(self, gate: Tensor, columns: Tensor) -> None:
        """Hold these columns back, detached, behind their gates."""
        assert self.gradient is not None
        keys, values = (
            states.detach().gather(2, columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
            for states in (self.rotated_keys(), self.values)
        )
        self.margin = Margin(keys, values, gate.gather(1, columns), self.gradient.gradient_scale)

    def _soften(self, gate: Tensor) -> None:
        """Add the logarithms of the gates to the biases so far; text has none."""
        assert self.gradient is not None
        softened = (self.metadata.modality != TEXT) & self.metadata.valid
        log_gate = torch.where(softened, gate, 1.0).clamp_min(torch.finfo(gate.dtype).tiny).log()
        log_gate = log_gate.detach() + self.gradient.gradient_scale * (log_gate - log_gate.detach())
        self.bias = log_gate if self.bias is None else self._padded_bias + log_gate

    def _note(self, gate: Tensor, stays: Tensor, gone: Tensor) -> None:
        """Add to the sums of `gate_sums`."""
        undecided = ((gate > 0.1) & (gate < 0.9) & (stays | gone)).sum()
        sums = torch.stack([(gate * stays).sum(), (gate * gone).sum(), undecided, stays.sum(), gone.sum()])
        self.gate_sums = sums if self.gate_sums is None else self.gate_sums + sums

    @property
    def _padded_bias(self) -> Tensor:
        """The bias of every column; those of the step have none yet."""
        assert self.bias is not None
        return torch.nn.functional.pad(self.bias, (0, len(self.metadata) - self.bias.shape[1]))

    def biased(self, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Queries and keys whose product has the bias of the soft form in it, in more channels (eight, for kernels)."""
        if self.bias is None:
            return query, key
        bias = (self._padded_bias / scale).to(key.dtype)[:, None, :, None].expand(-1, key.shape[1], -1, 1)
        pad = torch.nn.functional.pad
        return pad(pad(query, (0, 1), value=1.0), (0, 7)), pad(torch.cat((key, bias), -1), (0, 7))

    def _stays(self, kept: Eviction) -> Tensor:
        """Bool ``[R, N]``: which columns stay."""
        stays = torch.zeros_like(self.metadata.valid, dtype=torch.int8)
        # A maximum, because padding points at column 0.
        return stays.scatter_reduce_(1, kept.columns, kept.valid.to(torch.int8), "amax").bool()

    def _merge(self, merged: MergedTokens) -> tuple[Tensor, Tensor]:
        """Keys and values ``[R, G, S, D]`` of positions made of others: weighted means, keys without rotation."""
        keys = self._keys.tensor
        if not self._unrotated:
            keys = self._rotation.unrotate(keys, self.metadata.position_ids)
        # Column -1 (flows nowhere) is counted as one position more, which is then left out.
        into = torch.nn.functional.one_hot(merged.into + 1, merged.metadata.index.shape[1] + 1)[..., 1:]
        share = (into * merged.weight[..., None])[:, None].to(torch.promote_types(keys.dtype, torch.float32))
        keys, values = ((share.transpose(-1, -2) @ x.to(share.dtype)).to(x.dtype) for x in (keys, self._values.tensor))
        if not self._unrotated:
            keys = self._rotation.rotate(keys, merged.metadata.position_ids)
        return keys, values

    @property
    def differentiable_state(self) -> dict[str, Tensor]:
        """What gradients flow through from step to step."""
        found = {"keys": self._keys.tensor, "values": self._values.tensor}
        if self.learning:
            found["features"] = self._features.tensor
            found["gates"] = None if self.margin is None else self.margin.gates
            found["bias"] = self.bias
        if self.learns_attention:
            found["attention_scores"] = self.attention_scores
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @differentiable_state.setter
    def differentiable_state(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name == "gates":
                assert self.margin is not None
                self.margin = self.margin._replace(gates=tensor)
            elif name in ("attention_scores", "bias"):
                setattr(self, name, tensor)
            else:
                getattr(self, f"_{name}").restore((tensor, None))
        self._show()

    # ---- rotary positions -------------------------------------------------------------------------------

    @property
    def _unrotated(self) -> bool:
        """Whether keys are stored without their rotation, because their ids change."""
        return self.method.position_ids == "compact"

    @property
    def _rotation(self) -> Rotary:
        if self.rotary is None:
            raise RuntimeError("the memory has not been told the decoder's rotary embedding: see omnimem.memory.attach")
        return self.rotary

    def rotated_keys(self) -> Tensor:
        """The stored keys, post-RoPE."""
        return self._rotation.rotate(self.keys, self.metadata.position_ids) if self._unrotated else self.keys

    def _show(self) -> None:
        """Publish the columns, as they are stored, under the names transformers knows."""
        self.keys, self.values = self._keys.tensor, self._values.tensor

    def _rows(self, new: TokenMetadata) -> int:
        """Rows a sample of `new` has in what is stored."""
        return len(self.metadata.index) // len(new.index)

    # ---- reading ----------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, features (whole buffers at inference), facts and attention mass."""
        facts = 0 if self.metadata is None else self.metadata.nbytes
        mass = 0 if self.attention_scores is None else self.attention_scores.nbytes
        return self._keys.nbytes + self._values.nbytes + self._features.nbytes + facts + mass

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the keys and values of stored positions alone."""
        return sum(stored.tensor.nbytes for stored in (self._keys, self._values) if stored.tensor is not None)

    def state(self) -> dict[str, Any]:
        """Snapshot that `restore` takes back; valid until the next compression in place."""
        columns = {name: getattr(self, name).state() for name in COLUMNS}
        return columns | {name: getattr(self, name) for name in STATE}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a snapshot: whatever was appended after it is forgotten."""
        for name in COLUMNS:
            getattr(self, name).restore(state[name])
        for name in STATE:
            setattr(self, name, state[name])
        self._show()
        self._announced = self._new_features = None

    def get_seq_length(self) -> int:
        """Columns stored: what generate() counts from, so that its masks do not grow with the stream.

        Position ids do not follow from it: see `CompressedCache.rope_deltas`.
        """
        return 0 if self.metadata is None else len(self.metadata)

    def get_max_length(self) -> int:
        """No limit on what may be seen."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search would need one memory a beam.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError("a CompressedCache holds one memory a stream: generate with num_beams=1")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset for transformers' mask builder; the attention function does not use that mask."""
        return self.get_seq_length() + query_length, 0

"""One layer of the compressed cache, as transformers' attention modules use it.

A forward pass announces its tokens (`begin`), appends their states (`update`) and reports what the selection method
observes (`observe_…`). Afterwards `select` decides what is retained and `apply` evicts the rest. What is stored is the
immutable `LayerState`; selection, eviction, undo and the gradient of the selection are pure functions of it, in
modules of their own.

Where every key-value head retains its own tokens, `update` turns each head into a row of one head: everything after it
sees R = samples × heads rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from omnimem.budget import LayerBudget
from omnimem.memory import eviction as evictions
from omnimem.memory import undo
from omnimem.memory.codec import KvDtype
from omnimem.memory.eviction import Eviction
from omnimem.memory.margin import Margin
from omnimem.memory.rotary import KeyRotation, Rotary
from omnimem.memory.selection_gradient import SelectionGradient, attach_selection_gradient
from omnimem.memory.state import LayerState, Step
from omnimem.memory.token_buffer import TokenBuffer
from omnimem.modality import KINDS
from omnimem.selection.base import Arrival, AttentionScoreSpec, Candidates, Probe, SelectionMethod
from omnimem.token_metadata import TokenMetadata

LayerSnapshot = tuple[LayerState, Step | None]


class CompressedLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, bounded by its budget.

    Parameters
    ----------
    index, layers : int
        Number of the layer, and how many there are.
    budget : LayerBudget
        Visual and audio tokens retained by a compression.
    method : SelectionMethod
        Scores the candidates and declares what it observes.
    gradient : SelectionGradient, optional
        Under autograd, how gradients reach the selection.
    kv_dtype : KvDtype
        How stored keys and values are encoded.

    Attributes
    ----------
    state : LayerState
        What is stored.
    step : Step or None
        The running forward pass, or the last one.
    probe, probe_embeds
        The probe that runs at present, and the embeddings ``[B, P, C]`` every layer is given where it does not
        propagate.
    gate_sums : Tensor or None
        Sums of `omnimem.memory.selection_gradient.gate_statistics` over all compressions.
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
        kv_dtype: KvDtype = "auto",
    ) -> None:
        # Not super().__init__(): it would assign `keys` and `values`, which are properties here.
        self.index, self.num_layers = index, layers
        self.budget = budget
        self.method = method
        self.gradient = gradient
        self.kv_dtype: KvDtype = kv_dtype
        self.rotary: Rotary | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything, buffers included."""
        self.state = LayerState(features=TokenBuffer(1, codec=self.method.feature_codec))
        self.step: Step | None = None
        self.is_initialized = False
        self.probe: Probe | None = None
        self.probe_embeds: Tensor | None = None
        self._probe_scores: list[Tensor] = []
        self.gate_sums: Tensor | None = None

    # ---- one forward pass -------------------------------------------------------------------------------

    def begin(self, new: TokenMetadata, counts: list[dict[str, int]], ragged: bool, observe: bool) -> None:
        """Announce the tokens of the coming forward pass; those of the last one are settled.

        Parameters
        ----------
        new : TokenMetadata
            The T new tokens, one row per sample.
        counts : list of dict
            How many of them are text, visual and audio, for each sample.
        ragged : bool
            Whether any column, stored or new, may be padding.
        observe : bool
            Whether the selection method observes this pass.
        """
        self.pad_scores()
        before = self.state.token_counts or [dict.fromkeys(KINDS, 0)] * len(counts)
        total = tuple({name: a[name] + b[name] for name in KINDS} for a, b in zip(before, counts, strict=True))
        self.state = replace(self.state, token_counts=total)
        self.settle(len(new))
        valid = active = None
        if ragged:
            active, valid = new.valid.any(1, keepdim=True), new.valid
            if self.state.metadata is not None:
                # The heads of a sample hold equally many tokens, so its padding is that of any of them.
                stored = self.state.metadata.valid
                valid = torch.cat((stored[:: len(stored) // len(valid)], valid), dim=1)
        self.step = Step(new, len(self.state), observe, valid, active)

    def observe_hidden(self, hidden: Tensor) -> None:
        """Take the layer's input hidden states ``[B, T, C]`` of the new tokens."""
        if self.method.stores_features:
            assert self.step is not None
            hidden = hidden if self.learning else hidden.detach()
            arrival = Arrival(self.index, hidden, self.step.new, lambda: self.features, self.metadata)
            self.step.features = self.method.features(arrival)

    @property
    def observed_scores(self) -> AttentionScoreSpec | None:
        """Attention scores that this pass has to report; None for none."""
        return self.method.attention_scores if self.step is not None and self.step.observe else None

    def observe_attention(self, scores: Tensor) -> None:
        """Accumulate the attention scores ``[B, N + T]`` (per key-value head ``[B, G, N + T]``) of this pass."""
        assert self.step is not None
        new = (scores if self.learns_attention else scores.detach()).flatten(0, -2)
        old = self.state.attention_scores
        with nullcontext() if self.learns_attention else torch.no_grad():
            total = new if old is None else self.method.accumulate(old, new)
            padded = self.state.padded_scores()
            if old is not None and padded is not None and self.step.active is not None:
                # A sample without a query in this pass keeps the scores it has.
                active = self.step.active.repeat_interleave(len(old) // len(self.step.active), dim=0)
                total = torch.where(active, total, padded)
        self.state = replace(self.state, attention_scores=total)

    def observe_probe(self, attention: Tensor) -> None:
        """Take the attention ``[B, N]`` of a probe to the stored tokens."""
        self._probe_scores.append(attention)

    def reserve(self, tokens: int) -> None:
        """Make room for a probe: tokens appended beyond the buffer would copy it every time."""
        state = self.state
        self.state = replace(state, keys=state.keys.reserve(tokens), values=state.values.reserve(tokens))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Record dtype and device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append the states ``[B, G, T, D]`` of the announced tokens and return all ``[B, G, N + T, D]``, post-RoPE.

        Where states are encoded, only the new ones are returned: see `attention_parts`.
        """
        if self.step is None or self.step.appended:
            raise RuntimeError(
                "a CompressedCache needs its hooks: call omnimem.memory.attach(language_model) before using it"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        heads, length = key_states.shape[1:3]
        new, given = self.step.new, (key_states, value_states)
        if self.kv_dtype != "auto" and self.state.keys.codec is None:
            self.state = self.state.with_codecs(self.kv_dtype, key_states.shape[-1])
        if self.method.per_head:
            new = new.repeat(heads)
            key_states, value_states = key_states.flatten(0, 1)[:, None], value_states.flatten(0, 1)[:, None]

        key_states = self.rotation.to_stored(key_states, new.position_ids)
        self.state = self.state.append(
            new, key_states, value_states, self.step.features, lambda: self._capacity(length)
        )
        self.step.appended = True
        if self.kv_dtype != "auto":
            return given
        keys, values = self.rotated_keys(), self.values
        if self.method.per_head:
            return keys[:, 0].unflatten(0, (-1, heads)), values[:, 0].unflatten(0, (-1, heads))
        return keys, values

    def attention_parts(
        self, query: Tensor, key: Tensor, value: Tensor, at_once: bool
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Queries of some heads, and the keys and values they attend to, until all heads have been yielded.

        One part, unless stored states are encoded: then, without autograd, one for every key-value head, so that no
        more than one head is decoded at a time.

        Parameters
        ----------
        query : Tensor
            ``[B, H, T, D]``.
        key, value : Tensor
            What `update` returned.
        at_once : bool
            Whether all heads have to be in one part.

        Yields
        ------
        tuple of Tensor
            Queries ``[B, H', T, D]``, post-RoPE keys and values ``[B, G', N + T, D]``.
        """
        if self.kv_dtype == "auto":
            yield query, key, value
            return
        groups, state = key.shape[1], self.state
        size = 1 if state.keys.encoded and not at_once and not torch.is_grad_enabled() else groups
        for start in range(0, groups, size):
            rows, heads = slice(None), slice(start, start + size)
            if self.method.per_head:
                rows, heads = slice(start, None, groups // size), slice(None)
            keys = self.rotation.post_rope(state.keys.states_of(rows, heads), self.metadata.position_ids[rows])
            values = state.values.states_of(rows, heads)
            if self.method.per_head:
                keys, values = (states[:, 0].unflatten(0, (-1, size)) for states in (keys, values))
            yield query.unflatten(1, (groups, -1))[:, start : start + size].flatten(1, 2), keys, values

    def settle(self, new_tokens: int) -> None:
        """Encode the stored tokens that are not yet encoded; `new_tokens` is the length of the running step."""
        self.state = self.state.settle(lambda: self._capacity(new_tokens))

    def _capacity(self, new_tokens: int) -> int | None:
        """Tokens there can ever be after a step of this length; None without a budget."""
        if self.method.keeps_everything:
            return None
        return self.budget.total + max(sample["text"] for sample in self.token_counts) + new_tokens

    # ---- compression ------------------------------------------------------------------------------------

    @property
    def learning(self) -> bool:
        """Whether a gradient reaches the selection."""
        return self.gradient is not None

    @property
    def learns_attention(self) -> bool:
        """Whether it goes through the attention scores as well."""
        return self.gradient is not None and self.gradient.through_attention

    @property
    def over_budget(self) -> bool:
        """Whether some sample stores more tokens of a modality than its budget."""
        return not self.method.keeps_everything and evictions.over_budget(self.token_counts, self.budget)

    def pad_scores(self) -> None:
        """Give tokens of unobserved passes (text) the attention score 0."""
        if self.state.attention_scores is not None and self.state.attention_scores.shape[1] < len(self.state):
            self.state = replace(self.state, attention_scores=self.state.padded_scores())

    def candidates(self) -> Candidates:
        """What the selection method may look at; without a gradient into the selection, tensors have no graph."""
        values = self.values if self.method.reads_values else None
        keys = self.rotated_keys() if self.method.reads_keys else None
        if not self.learning:
            values, keys = (None if states is None else states.detach() for states in (values, keys))
        return Candidates(
            layer=self.index,
            num_layers=self.num_layers,
            budget=self.budget,
            num_previous=self.state.num_previous,
            values=values,
            keys=keys,
            metadata=self.metadata,
            attention_scores=self.attention_scores,
            probe_scores=tuple(self._probe_scores),
            features=self.features,
        )

    def select(self, candidates: Candidates | None, score: Tensor | None, ragged: bool) -> Eviction | None:
        """Decide what is retained; None where the state does not change. See `omnimem.memory.eviction.select`."""
        if self.over_budget:
            return evictions.select(self.state, self.method, candidates, score)
        return evictions.select(self.state, self.method) if ragged else None

    def apply(
        self, eviction: Eviction | None, score: Tensor | None = None, log_evicted: bool = False
    ) -> Eviction | None:
        """Evict, and return the eviction with its margin (given scores) and its undo log (with `log_evicted`)."""
        assert self.step is not None
        self._probe_scores = []
        state, start = replace(self.state, margin=None), self.step.start
        if eviction is not None:
            if score is not None:
                assert self.gradient is not None
                state, eviction, statistics = attach_selection_gradient(
                    state, eviction, score, self.gradient, self.budget, start, self.rotation
                )
                if statistics is not None:
                    self.add_gate_statistics(statistics)
            if log_evicted:
                eviction = eviction._replace(log=undo.log_of(state, eviction, start))
            budget = None if self.method.keeps_everything else self.budget
            state = evictions.apply(state, eviction, budget, self.rotation)
        self.state = replace(state, num_previous=len(state))
        return eviction

    def add_gate_statistics(self, statistics: Tensor) -> None:
        """Add to the sums over all compressions."""
        self.gate_sums = statistics if self.gate_sums is None else self.gate_sums + statistics

    def renumber(self, metadata: TokenMetadata) -> None:
        """Replace the metadata of the stored tokens by the same with new position ids."""
        self.state = replace(self.state, metadata=metadata)

    # ---- reading ----------------------------------------------------------------------------------------

    @property
    def keys(self) -> Any:
        """``[R, G, N, D]`` as stored, decoded: without rotation where `rotation` says so."""
        return self.state.keys.states

    @property
    def values(self) -> Any:
        """``[R, G, N, D]``, decoded."""
        return self.state.values.states

    @property
    def features(self) -> Tensor | None:
        """``[R, N, F]``."""
        return self.state.features.states

    @property
    def metadata(self) -> Any:
        """`TokenMetadata` of the stored tokens; None before the first step."""
        return self.state.metadata

    @property
    def attention_scores(self) -> Tensor | None:
        """Accumulated attention scores ``[R, M]``, M ≤ N."""
        return self.state.attention_scores

    @property
    def token_counts(self) -> tuple[dict[str, int], ...]:
        """Stored text, visual and audio tokens of each sample."""
        return self.state.token_counts

    @property
    def margin(self) -> Margin | None:
        """See `LayerState`."""
        return self.state.margin

    @property
    def rotation(self) -> KeyRotation:
        """How keys are stored."""
        return KeyRotation(self.rotary, self.method.position_ids == "compact")

    def rotated_keys(self) -> Tensor:
        """The stored keys, post-RoPE."""
        return self.rotation.post_rope(self.keys, self.metadata.position_ids)

    def snapshot(self) -> LayerSnapshot:
        """What `restore` takes; valid until the next in-place compression."""
        return self.state, self.step

    def restore(self, snapshot: LayerSnapshot) -> None:
        """Return to a snapshot; what was appended after it is forgotten."""
        self.state, self.step = snapshot

    # ---- transformers' interface ------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Stored columns: what generate() counts from, so that its masks do not grow with the stream.

        Position ids do not follow from it: see `CompressedCache.rope_deltas`.
        """
        return len(self.state)

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search is not supported.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError("beam search is not supported with a CompressedCache: set num_beams=1")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset for transformers' mask builder; the attention function does not use that mask."""
        return self.get_seq_length() + query_length, 0

"""The compressed cache: a transformers `Cache` whose layers each hold a bounded number of tokens.

Layer l holds ``[text | retained visual and audio]`` with its own length. A step appends a chunk, `compress` reduces
every layer to its budget (arXiv 2606.07577). Questions run inside `scratch()`, after which the cache is as
before::

    cache = CompressedCache(profile, build_selection("omnimem"))
    attach(language_model)                                        # once per model
    language_model(inputs_embeds=chunk, position_ids=ids, past_key_values=cache, modality=modality)
    cache.compress()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from omnimem.budget import BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.memory import undo
from omnimem.memory.codec import KvDtype
from omnimem.memory.compact_position_ids import CompactPositionIds
from omnimem.memory.eviction import Eviction
from omnimem.memory.layer import CompressedLayer, LayerSnapshot
from omnimem.memory.rotary import Rotary
from omnimem.memory.selection_gradient import SelectionGradient
from omnimem.modality import KINDS, TEXT
from omnimem.selection.base import Probe, SelectionMethod
from omnimem.token_metadata import TokenMetadata, count_tokens

Gradients = dict[tuple[int, str], Tensor]
"""Gradients of a cache's tensors by layer and name, as in `CompressedCache.differentiable_state`."""


class CacheSnapshot(NamedTuple):
    """A cache at one moment: each layer's state, and the cache's own counters."""

    layers: list[LayerSnapshot]
    counters: tuple

    @property
    def without_tokens(self) -> CacheSnapshot:
        """The same moment without keys, values and features, which `CompressedCache.undo` restores."""
        return CacheSnapshot([(state.without_tokens, None) for state, _ in self.layers], self.counters)


class CompressedCache(Cache):
    """Key-value cache of a stream, bounded per layer and modality.

    Parameters
    ----------
    profile : BudgetProfile
        Visual and audio budget of each layer.
    method : SelectionMethod
        Decides which tokens are retained.
    gradient : SelectionGradient, optional
        Under autograd, how gradients reach the selection; unused without autograd.
    kv_dtype : {"auto", "fp8", "int8", "int4"}
        How stored keys and values are encoded (`omnimem.memory.codec`); ``auto``: not at all. The tokens of a forward
        pass attend to each other unrounded and are encoded when they are compressed or the next pass begins.

    Attributes
    ----------
    next_position_id : Tensor or None
        ``[B]``, dtype of the position ids: the rotary position id of the next text token.
    detach_below : int
        Layer whose input is detached from the layers below; 0: nothing is detached.
    lockstep : bool
        Whether processes share weights: then layers below `detach_below` still take part in the backward pass, with
        zero gradients.

    Raises
    ------
    OmniMemError
        No gradient can reach the selection of this method with these settings, or `kv_dtype` is unknown or cannot be
        combined with the method.
    """

    layers: list[CompressedLayer]

    def __init__(
        self,
        profile: BudgetProfile,
        method: SelectionMethod,
        gradient: SelectionGradient | None = None,
        kv_dtype: KvDtype = "auto",
    ) -> None:
        if gradient is not None:
            _check_gradient(gradient, method)
        _check_kv_dtype(kv_dtype, method)
        count = len(profile.layers)
        super().__init__(
            layers=[
                CompressedLayer(i, count, budget, method, gradient, kv_dtype) for i, budget in enumerate(profile.layers)
            ]
        )
        self.profile = profile
        self.method = method
        self.gradient = gradient
        self.kv_dtype: KvDtype = kv_dtype
        self.spatial_ids_advance = False
        self._start()

    def _start(self) -> None:
        self.next_position_id: Tensor | None = None
        self._next_index: Tensor | None = None
        self._ragged = False
        self._in_scratch = False
        self.detach_below, self.lockstep = 0, False
        self._largest_nbytes = 0
        self._compact_ids = CompactPositionIds() if self.method.position_ids == "compact" else None

    def reset(self) -> None:
        """Forget the stream."""
        for layer in self.layers:
            layer.reset()
        self._start()

    # ---- one forward pass -------------------------------------------------------------------------------

    def bind(self, rotary: Rotary) -> None:
        """Set how the decoder rotates its keys (called by the hooks of `attach`)."""
        for layer in self.layers:
            layer.rotary = rotary

    def assign_position_ids(
        self,
        position_ids: Tensor,
        modality: Tensor,
        valid: Tensor | None,
        next_position_id: Tensor,
        text: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Turn an encoder's position ids, which grow with the stream, into those of this cache.

        Returns them unchanged under the policy `original`; see `CompactPositionIds.assign` for the parameters.
        """
        if self._compact_ids is None:
            return position_ids, next_position_id
        self._compact_ids.spatial_ids_advance = self.spatial_ids_advance
        return self._compact_ids.assign(position_ids, modality, valid, next_position_id, text)

    def begin(
        self,
        position_ids: Tensor,
        modality: Tensor | None = None,
        time: Tensor | None = None,
        valid: Tensor | None = None,
        next_position_id: Tensor | None = None,
    ) -> None:
        """Announce the T tokens of the coming forward pass (called by the hooks of `attach`).

        Parameters
        ----------
        position_ids : Tensor
            ``[3, B, T]`` rotary ids, as `assign_position_ids` returns them.
        modality : Tensor, optional
            int ``[B, T]``; all text when left out, and then the selection method observes nothing.
        time : Tensor, optional
            ``[B, T]`` seconds into the media; NaN when left out.
        valid : Tensor, optional
            bool ``[B, T]``, False for padding.
        next_position_id : Tensor, optional
            ``[B]`` rotary id of the text that follows; one past the largest id when left out.
        """
        _, batch, length = position_ids.shape
        device = position_ids.device
        real = torch.ones(batch, length, dtype=torch.bool, device=device) if valid is None else valid.bool()
        if self._next_index is None:
            self._next_index = torch.zeros(batch, dtype=torch.int64, device=device)
        if self.next_position_id is None:
            self.next_position_id = torch.zeros(batch, dtype=torch.int64, device=device)
        observe = modality is not None
        if modality is None:
            modality = torch.full((batch, length), TEXT, dtype=torch.int8, device=device)
        counts = count_tokens(modality, real)
        if time is None:
            time = torch.full((batch, length), torch.nan, device=device)
        metadata = TokenMetadata(
            index=self._next_index[:, None] + real.cumsum(1) - 1,
            position_ids=position_ids.permute(1, 2, 0).contiguous(),
            time=time.float(),
            modality=modality.to(torch.int8),
            valid=real,
        )
        # Samples retain different numbers of each modality even when their chunks are equally long.
        self._ragged = self._ragged or batch > 1 or sum(counts[0].values()) < length
        for layer in self.layers:
            layer.begin(metadata, counts, self._ragged, observe)
        if next_position_id is None:
            last = position_ids.amax(0).masked_fill(~real, -1).amax(1)
            next_position_id = torch.maximum(self.next_position_id, last.ceil().long() + 1)
        self.next_position_id = next_position_id.to(device)
        self._next_index = self._next_index + real.sum(1)

    @contextmanager
    def scratch(self) -> Iterator[CompressedCache]:
        """On exit, discard what was appended inside: a question and its answer."""
        before = self.snapshot()
        self._in_scratch = True
        try:
            yield self
        finally:
            self._note_peak()
            self.restore(before)

    @contextmanager
    def probing(self, probe: Probe, embeds: Tensor) -> Iterator[None]:
        """A `scratch` inside which every layer records the attention of a probe of ``[B, P, C]`` embeddings."""
        for layer in self.layers:
            layer.reserve(embeds.shape[1])
        with self.scratch():
            for layer in self.layers:
                layer.probe = probe
                layer.probe_embeds = None if probe.propagates else embeds
            try:
                yield
            finally:
                for layer in self.layers:
                    layer.probe = layer.probe_embeds = None

    # ---- compression and its inverse --------------------------------------------------------------------

    def compress(self, replay: list[Eviction | None] | None = None, log_evicted: bool = False) -> list[Eviction | None]:
        """Reduce every layer to its budget.

        Parameters
        ----------
        replay : list, optional
            What an earlier call on the same state returned: repeat those evictions.
        log_evicted : bool
            Whether to return the evicted tokens as well, so that `undo` can restore them.

        Returns
        -------
        list of (Eviction or None)
            One per layer; None where nothing was evicted.
        """
        self._note_peak()
        if self._in_scratch:
            raise RuntimeError("compress() inside scratch(): a question must not change the cache")
        for layer in self.layers:
            layer.pad_scores()
            if layer.step is not None:
                layer.settle(len(layer.step.new))
        learning = self.gradient is not None
        scored = self._scored() if replay is None or learning else [(None, None)] * len(self.layers)
        evictions = replay or [
            layer.select(candidates, score, self._ragged)
            for layer, (candidates, score) in zip(self.layers, scored, strict=True)
        ]
        evictions = [
            layer.apply(eviction, score if learning else None, log_evicted)
            for layer, eviction, (_, score) in zip(self.layers, evictions, scored, strict=True)
        ]
        if self._compact_ids is not None and self._next_index is not None:
            metadata = self._compact_ids.renumber([layer.metadata for layer in self.layers], len(self._next_index))
            for layer, renumbered in zip(self.layers, metadata, strict=True):
                layer.renumber(renumbered)
            if self._compact_ids.next is not None:
                self.next_position_id = self._compact_ids.next
        return evictions

    def _scored(self) -> list[Any]:
        """Candidates and score of each layer; nothing where no layer has to evict."""
        if not any(layer.over_budget for layer in self.layers):
            return [(None, None)] * len(self.layers)
        with torch.no_grad() if self.gradient is None else nullcontext():
            scores = self.method.scores(layer.candidates() for layer in self.layers)
            if self.kv_dtype == "auto":
                return list(scores)
            # Decoded keys and values are there for the scores alone, so that they are not held for all layers.
            return [(replace(candidates, keys=None, values=None), score) for candidates, score in scores]

    def snapshot(self) -> CacheSnapshot:
        """What `restore` takes; valid until the next in-place compression."""
        ids = None if self._compact_ids is None else self._compact_ids.state()
        counters = (self.next_position_id, self._next_index, self._ragged, self._in_scratch, ids)
        return CacheSnapshot([layer.snapshot() for layer in self.layers], counters)

    def restore(self, snapshot: CacheSnapshot) -> None:
        """Return to a snapshot."""
        for layer, layer_snapshot in zip(self.layers, snapshot.layers, strict=True):
            layer.restore(layer_snapshot)
        self.next_position_id, self._next_index, self._ragged, self._in_scratch, ids = snapshot.counters
        if self._compact_ids is not None:
            self._compact_ids.restore(ids)

    def undo(self, before: CacheSnapshot, evictions: list[Eviction | None]) -> None:
        """Undo the last step.

        Parameters
        ----------
        before : CacheSnapshot
            The moment before the step; its tokens are not used (see `CacheSnapshot.without_tokens`).
        evictions : list
            What the step's `compress` returned with `log_evicted`; Nones if it was not compressed.
        """
        layers: list[LayerSnapshot] = [
            (undo.undo(layer.state, eviction, state), None)
            for layer, eviction, (state, _) in zip(self.layers, evictions, before.layers, strict=True)
        ]
        self.restore(CacheSnapshot(layers, before.counters))

    # ---- gradients from step to step --------------------------------------------------------------------

    @property
    def differentiable_state(self) -> dict[tuple[int, str], Tensor]:
        """Tensors through which gradients flow from step to step, by layer and name."""
        selection, scores = self.gradient is not None, self.gradient is not None and self.gradient.through_attention
        return {
            (i, name): tensor
            for i, layer in enumerate(self.layers)
            for name, tensor in undo.differentiable_state(layer.state, selection, scores).items()
        }

    @differentiable_state.setter
    def differentiable_state(self, tensors: dict[tuple[int, str], Tensor]) -> None:
        for i, layer in enumerate(self.layers):
            layer.state = undo.with_tensors(layer.state, _of_layer(tensors, i))

    def step_outputs(
        self, gradients: Gradients, evictions: list[Eviction | None], before: CacheSnapshot
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each tensor that the step just run made or changed, with its gradient in the tensor's dtype.

        Parameters
        ----------
        gradients : dict
            Gradients of `differentiable_state` after the step.
        evictions : list
            What the step's `compress` returned; Nones if it was not compressed.
        before : CacheSnapshot
            The moment before the step; its tokens are not used.
        """
        tensors = self.differentiable_state
        for i, (layer, eviction, (state, _)) in enumerate(zip(self.layers, evictions, before.layers, strict=True)):
            own = _of_layer(gradients, i)
            yield from undo.step_outputs(layer.state, _of_layer(tensors, i), own, eviction, len(state))

    def carried_gradients(
        self, gradients: Gradients, evictions: list[Eviction | None], before: CacheSnapshot
    ) -> Gradients:
        """Gradients, before a step, of the tokens that the step did not change.

        Parameters as for `step_outputs`; `gradients` is emptied.
        """
        found: Gradients = {}
        for i, (layer, eviction, (state, _)) in enumerate(zip(self.layers, evictions, before.layers, strict=True)):
            own = {name: gradients.pop((i, name)) for index, name in list(gradients) if index == i}
            carried = undo.carried_gradients(layer.state, own, eviction, len(state))
            found |= {(i, name): gradient for name, gradient in carried.items()}
        return found

    # ---- reading ----------------------------------------------------------------------------------------

    @property
    def rope_deltas(self) -> Tensor:
        """``[B, 1]``: generate() computes position id = column + rope_delta, counting columns from `get_seq_length`."""
        if self.next_position_id is None:
            raise RuntimeError("the cache is empty: nothing has been streamed yet")
        following = self.next_position_id
        if following.is_floating_point():
            following = following.double()  # float32 could lose fractional ids for large counts
        return (following - self.get_seq_length())[:, None]

    def token_metadata(self, layer: int) -> TokenMetadata:
        """Metadata of the tokens stored in a layer: stream index, position ids, seconds, modality, validity.

        One row per sample, or per sample and key-value head where the method retains tokens per head.
        """
        metadata = self.layers[layer].metadata
        if metadata is None:
            raise RuntimeError("the cache is empty: nothing has been streamed yet")
        return metadata

    def token_counts(self) -> list[dict[str, list[int]]]:
        """Stored text, visual and audio tokens of each layer, one number per sample of the batch."""
        return [
            {name: [sample[name] for sample in layer.token_counts] or [0] for name in KINDS} for layer in self.layers
        ]

    def mean_token_counts(self) -> dict[str, float]:
        """Mean over layers and samples of the stored text, visual and audio tokens."""
        counts = self.token_counts()
        return {name: sum(sum(layer[name]) / len(layer[name]) for layer in counts) / len(counts) for name in counts[0]}

    def gate_statistics(self) -> dict[str, float] | None:
        """Mean gate of the tokens retained and of those evicted by all compressions, and the share of undecided ones
        (between 0.1 and 0.9); None where no gradient reaches the selection.
        """
        sums = [layer.gate_sums for layer in self.layers if layer.gate_sums is not None]
        if not sums:
            return None
        retained, evicted, undecided, num_retained, num_evicted = (
            torch.stack([one.double() for one in sums]).sum(0).tolist()
        )
        return {
            "retained": retained / max(1, num_retained),
            "evicted": evicted / max(1, num_evicted),
            "undecided": undecided / (num_retained + num_evicted),
        }

    def lengths(self) -> list[int]:
        """Stored columns of each layer (of the longest sample, in a batch)."""
        return [len(layer.state) for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all layers: buffers, which have room for a chunk, metadata and attention scores."""
        return sum(layer.state.nbytes for layer in self.layers)

    @property
    def resident_nbytes(self) -> int:
        """Bytes of the stored tokens of all layers: keys, values, features, metadata, attention scores."""
        return sum(layer.state.resident_nbytes for layer in self.layers)

    @property
    def peak_nbytes(self) -> int:
        """Largest `nbytes` since the last `reset`: before a compression, at the end of a question or probe, or now."""
        return max(self._largest_nbytes, self.nbytes)

    def _note_peak(self) -> None:
        self._largest_nbytes = self.peak_nbytes

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the stored keys and values alone."""
        return sum(layer.state.kv_nbytes for layer in self.layers)


def _check_gradient(gradient: SelectionGradient, method: SelectionMethod) -> None:
    if not (method.differentiable and method.position_ids == "original"):
        raise OmniMemError(
            f"no gradient can reach the selection of {type(method).__name__} with these settings: use "
            "selection.method=learned, omnimem or similarity_only with selection.position_ids=original, or set "
            "selection.gradient=none"
        )
    if gradient.through_attention and (method.attention_scores is None or method.attention_scores.kind == "concat"):
        raise OmniMemError(
            "gate.through_attention: the gradient goes through the attention scores, which needs selection.lambda "
            "above 0 and selection.attention_scores=heads"
        )


def _check_kv_dtype(kv_dtype: KvDtype, method: SelectionMethod) -> None:
    if kv_dtype not in get_args(KvDtype):
        raise OmniMemError(f"unknown kv_dtype {kv_dtype!r} (known: {', '.join(get_args(KvDtype))})")
    spec = method.attention_scores
    if kv_dtype != "auto" and spec is not None and spec.kind == "concat":
        raise OmniMemError(
            f"attention_scores=concat needs the keys of all heads at once, which kv_dtype={kv_dtype} does not decode: "
            "use attention_scores=heads or kv_dtype=auto"
        )


def _of_layer(tensors: dict[tuple[int, str], Tensor], layer: int) -> dict[str, Tensor]:
    return {name: tensor for (index, name), tensor in tensors.items() if index == layer}

"""The compressed cache: a transformers `Cache` whose layers each hold a bounded number of positions.

Layer l holds ``[text | retained visual and audio]`` with its own length. A step appends a chunk, `compress` brings
every layer back to its budget (method.md §1). Questions run inside `scratch()`, which leaves no trace::

    cache = CompressedCache(profile, build_selection("omnimem"))
    attach(language_model)                                        # once per model
    language_model(inputs_embeds=chunk, position_ids=ids, past_key_values=cache, modality=kinds)
    cache.compress()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from omnimem.budget import BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.memory import undo
from omnimem.memory.columns import COLUMNS
from omnimem.memory.layer import CompressedLayer, Eviction
from omnimem.memory.margin import SelectionGradient
from omnimem.memory.numbering import CompactPositionIds
from omnimem.memory.rotary import Rotary
from omnimem.memory.table import TokenMetadata, count
from omnimem.modality import KINDS, TEXT
from omnimem.selection.base import Probe, SelectionMethod

Gradients = dict[tuple[int, str], Tensor]
"""Gradients of tensors of the memory by layer and name, as in `CompressedCache.flowing`."""


class MemoryState(NamedTuple):
    """The state of a memory at one moment: each layer's tensors, and the cache's own counters."""

    layers: list[dict[str, Any]]
    counters: tuple

    @property
    def facts(self) -> MemoryState:
        """The same moment without the stored columns, which `CompressedCache.rewind` finds again."""
        bare = {name: (None, None) for name in COLUMNS}
        return MemoryState([{**layer, **bare} for layer in self.layers], self.counters)


class CompressedCache(Cache):
    """Key-value memory of a stream, bounded per layer and modality.

    Parameters
    ----------
    profile : BudgetProfile
        Visual and audio budget of each layer.
    method : SelectionMethod
        Decides which positions stay.
    gradient : SelectionGradient, optional
        Under autograd, how gradients reach the selection; without autograd nothing of it exists.

    Attributes
    ----------
    next_position_id : Tensor or None
        int64 ``[B]``: the rotary position the next text token takes.
    cut : int
        Layer whose input carries no gradient to the layers below; 0: all do.
    lockstep : bool
        Whether those layers are differentiated all the same, to a gradient of zero.
    """

    layers: list[CompressedLayer]

    def __init__(
        self, profile: BudgetProfile, method: SelectionMethod, gradient: SelectionGradient | None = None
    ) -> None:
        if gradient is not None and not (method.differentiable and method.position_ids == "original"):
            raise OmniMemError(
                f"no gradient can reach the selection of {type(method).__name__} as it is set: it takes "
                "selection.method=omnimem or similarity_only with redundancy=hidden and position_ids=original, or "
                "selection.gradient=none"
            )
        if (
            gradient is not None
            and gradient.through_attention
            and (method.attention_scores is None or method.attention_scores.kind == "concat")
        ):
            raise OmniMemError(
                "gate.through_attention: the gradient goes through the attention scores, which takes selection.lambda "
                "above 0 and "
                "selection.attention_scores=heads"
            )
        count = len(profile.layers)
        super().__init__(
            layers=[CompressedLayer(i, count, budget, method, gradient) for i, budget in enumerate(profile.layers)]
        )
        self.profile = profile
        self.method = method
        self.gradient = gradient
        self.spatial_ids_advance = False
        self._start()

    def _start(self) -> None:
        self.next_position_id: Tensor | None = None
        self._next_index: Tensor | None = None
        self._ragged = False
        self._in_scratch = False
        self.cut, self.lockstep = 0, False
        self._numbering = CompactPositionIds() if self.method.position_ids == "compact" else None

    def reset(self) -> None:
        """Forget the stream."""
        for layer in self.layers:
            layer.reset()
        self._start()

    # ---- one forward step -------------------------------------------------------------------------------

    def bind(self, rotary: Rotary) -> None:
        """Learn how the decoder rotates its keys (called by the hooks of `attach`)."""
        for layer in self.layers:
            layer.rotary = rotary

    def assign_position_ids(
        self, positions: Tensor, modality: Tensor, valid: Tensor | None, next_position_id: Tensor, text: bool = False
    ) -> tuple[Tensor, Tensor]:
        """From the rotary ids of an encoder, which count on for ever, to those of this memory.

        The same under the position policy `original`; see `CompactPositionIds.assign` for the parameters.
        """
        if self._numbering is None:
            return positions, next_position_id
        self._numbering.anchored = self.spatial_ids_advance
        return self._numbering.assign(positions, modality, valid, next_position_id, text)

    def begin(
        self,
        position_ids: Tensor,
        modality: Tensor | None = None,
        time: Tensor | None = None,
        valid: Tensor | None = None,
        next_position_id: Tensor | None = None,
    ) -> None:
        """Announce the T positions of the coming forward pass (called by the hooks of `attach`).

        Parameters
        ----------
        position_ids : Tensor
            ``[3, B, T]`` rotary ids, those of `place`.
        modality : Tensor, optional
            int ``[B, T]``; all text when left out, and then nothing is observed for selection.
        time : Tensor, optional
            ``[B, T]`` seconds into the media; NaN when left out.
        valid : Tensor, optional
            bool ``[B, T]``, False for padding.
        next_position_id : Tensor, optional
            ``[B]`` rotary position of the text that follows; one past the largest id when left out.
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
        counts = count(modality, real)
        if time is None:
            time = torch.full((batch, length), torch.nan, device=device)
        table = TokenMetadata(
            index=self._next_index[:, None] + real.cumsum(1) - 1,
            position_ids=position_ids.permute(1, 2, 0).contiguous(),
            time=time.float(),
            modality=modality.to(torch.int8),
            valid=real,
        )
        # Samples keep different numbers of each modality even when their chunks are equally long.
        self._ragged = self._ragged or batch > 1 or sum(counts[0].values()) < length
        for layer in self.layers:
            layer.begin(table, counts, self._ragged, observe)
        if next_position_id is None:
            last = position_ids.amax(0).masked_fill(~real, -1).amax(1)
            next_position_id = torch.maximum(self.next_position_id, last.ceil().long() + 1)
        self.next_position_id = next_position_id.to(device)
        self._next_index = self._next_index + real.sum(1)

    def compress(self, replay: list[Eviction | None] | None = None, rewindable: bool = False) -> list[Eviction | None]:
        """Bring every layer back to its budget.

        Parameters
        ----------
        replay : list, optional
            What an earlier call on the same state returned: repeat those decisions.
        rewindable : bool
            Whether to return what goes as well, so that `rewind` can undo the step.

        Returns
        -------
        list of (Kept or None)
            Per layer what stayed (and was held back), None where nothing was evicted.
        """
        if self._in_scratch:
            raise RuntimeError("a question must not change the memory: compress() inside scratch()")
        for layer in self.layers:
            layer.accumulate()
        learning = self.gradient is not None
        scored = self._scored() if replay is None or learning else [(None, None)] * len(self.layers)
        kept = replay or [layer.decide(*one) for layer, one in zip(self.layers, scored, strict=True)]
        kept = [
            layer.take(one, score if learning else None, rewindable)
            for layer, one, (_, score) in zip(self.layers, kept, scored, strict=True)
        ]
        if self._numbering is not None and self._next_index is not None:
            tables = self._numbering.renumber([layer.metadata for layer in self.layers], len(self._next_index))
            for layer, table in zip(self.layers, tables, strict=True):
                layer.metadata = table
            if self._numbering.next is not None:
                self.next_position_id = self._numbering.next
        return kept

    def _scored(self) -> list[Any]:
        """Candidates and score of each layer; nothing where no layer has to evict."""
        if not any(layer.over_budget for layer in self.layers):
            return [(None, None)] * len(self.layers)
        with torch.no_grad() if self.gradient is None else nullcontext():
            return list(self.method.scores(layer.candidates() for layer in self.layers))

    def state(self) -> MemoryState:
        """Snapshot for `restore`; under in-place compaction valid until the next one."""
        numbers = None if self._numbering is None else self._numbering.state()
        counters = (self.next_position_id, self._next_index, self._ragged, self._in_scratch, numbers)
        return MemoryState([layer.state() for layer in self.layers], counters)

    def restore(self, state: MemoryState) -> None:
        """Return to a snapshot."""
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            layer.restore(layer_state)
        self.next_position_id, self._next_index, self._ragged, self._in_scratch, numbers = state.counters
        if self._numbering is not None:
            self._numbering.restore(numbers)

    def rewind(self, before: MemoryState, decided: list[Eviction | None]) -> None:
        """Undo the last step.

        Parameters
        ----------
        before : MemoryState
            The moment before the step; of it only the `facts` are used.
        decided : list
            What the step's `compress`, made `rewindable`, returned; Nones if it was not compressed.
        """
        for layer, kept, facts in zip(self.layers, decided, before.layers, strict=True):
            undo.rewind(layer, kept, _length(facts))
        columns = [{name: getattr(layer, name).state() for name in COLUMNS} for layer in self.layers]
        states = [{**facts, **own} for facts, own in zip(before.layers, columns, strict=True)]
        self.restore(MemoryState(states, before.counters))

    @property
    def differentiable_state(self) -> dict[tuple[int, str], Tensor]:
        """What gradients flow through from step to step, by layer and name: keys and values, and of the selection what
        it learns from.
        """
        return {
            (i, name): one for i, layer in enumerate(self.layers) for name, one in layer.differentiable_state.items()
        }

    @differentiable_state.setter
    def differentiable_state(self, tensors: dict[tuple[int, str], Tensor]) -> None:
        for i, layer in enumerate(self.layers):
            layer.differentiable_state = {name: tensor for (index, name), tensor in tensors.items() if index == i}

    def brought(
        self, gradients: Gradients, decided: list[Eviction | None], before: MemoryState
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What a step that was just run made or changed: each tensor and its gradient, in the tensor's dtype.

        Parameters
        ----------
        gradients : dict
            Gradients of `flowing` after the step.
        decided : list
            What the step's `compress` returned; Nones if it was not compressed.
        before : MemoryState
            The moment before the step; of it only the `facts` are used.
        """
        for i, (layer, kept, facts) in enumerate(zip(self.layers, decided, before.layers, strict=True)):
            own = {name: gradient for (index, name), gradient in gradients.items() if index == i}
            yield from undo.brought(layer, own, kept, _length(facts))

    def unchanged(self, gradients: Gradients, decided: list[Eviction | None], before: MemoryState) -> Gradients:
        """Gradients, before a step, of what the step did not change.

        Parameters as for `brought`; `gradients` is used up.
        """
        found: Gradients = {}
        for i, (layer, kept, facts) in enumerate(zip(self.layers, decided, before.layers, strict=True)):
            own = {name: gradients.pop((i, name)) for index, name in list(gradients) if index == i}
            found |= {(i, name): one for name, one in undo.unchanged(layer, own, kept, _length(facts)).items()}
        return found

    @contextmanager
    def scratch(self) -> Iterator[CompressedCache]:
        """Whatever is appended inside (a question and its answer) is forgotten at the end."""
        before = self.state()
        self._in_scratch = True
        try:
            yield self
        finally:
            self.restore(before)

    @contextmanager
    def probing(self, probe: Probe, embeds: Tensor) -> Iterator[None]:
        """A `scratch` inside which every layer notes how the step, a probe of ``[B, P, C]`` embeddings, attends."""
        for layer in self.layers:
            layer.reserve(embeds.shape[1])
        with self.scratch():
            for layer in self.layers:
                layer.probe = probe
                layer.shown = None if probe.propagates else embeds
            try:
                yield
            finally:
                for layer in self.layers:
                    layer.probe = layer.shown = None

    # ---- reading ----------------------------------------------------------------------------------------

    @property
    def rope_deltas(self) -> Tensor:
        """``[B, 1]``: what generate() adds to its count of tokens, from `get_seq_length` on, to get position ids."""
        if self.next_position_id is None:
            raise RuntimeError("the memory is empty: nothing has been streamed yet")
        following = self.next_position_id
        if following.is_floating_point():
            following = following.double()  # beside the larger count float32 would round a fraction away
        return (following - self.get_seq_length())[:, None]

    def token_metadata(self, layer: int) -> TokenMetadata:
        """Facts of the positions stored in a layer: stream index, rotary ids, seconds, modality, validity.

        One row a sample; one a sample and key-value head where the method keeps positions per head.
        """
        table = self.layers[layer].metadata
        if table is None:
            raise RuntimeError("the memory is empty: nothing has been streamed yet")
        return table

    def token_counts(self) -> list[dict[str, list[int]]]:
        """Stored text, visual and audio positions of each layer, one number a sample of the batch."""
        return [{name: [sample[name] for sample in layer.counts] or [0] for name in KINDS} for layer in self.layers]

    def mean_token_counts(self) -> dict[str, float]:
        """Mean over layers and samples of the stored text, visual and audio positions."""
        counts = self.token_counts()
        return {name: sum(sum(layer[name]) / len(layer[name]) for layer in counts) / len(counts) for name in counts[0]}

    def gate_statistics(self) -> dict[str, float] | None:
        """What the gates of all decisions were like: the mean of those kept and of those evicted, and how many of all
        were undecided (between 0.1 and 0.9); None where no gradient reaches the selection.
        """
        sums = [layer.gate_sums for layer in self.layers if layer.gate_sums is not None]
        if not sums:
            return None
        kept, evicted, undecided, stays, gone = torch.stack([one.double() for one in sums]).sum(0).tolist()
        return {
            "kept": kept / max(1, stays),
            "evicted": evicted / max(1, gone),
            "undecided": undecided / (stays + gone),
        }

    def lengths(self) -> list[int]:
        """Stored columns of each layer (the longest sample's, in a batch)."""
        return [0 if layer.metadata is None else len(layer.metadata) for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the memory: buffers, facts and selection state of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the stored keys and values alone."""
        return sum(layer.kv_nbytes for layer in self.layers)


def _length(facts: dict[str, Any]) -> int:
    """Columns of a layer in this state."""
    return 0 if facts["metadata"] is None else len(facts["metadata"])

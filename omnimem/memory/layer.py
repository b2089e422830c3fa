"""One layer of the memory: post-RoPE keys and values of text, visual and audio positions, and what selection needs.

A step announces its positions (`begin`), appends their states (`update`) and reports what it saw (`observe_…`);
`compress` then keeps the budget's worth. How tensors are held is `omnimem.memory.columns`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from omnimem.budget import LayerBudget
from omnimem.memory.columns import Columns
from omnimem.memory.table import PositionTable
from omnimem.modality import EVICTABLE, TEXT
from omnimem.selection.base import Candidates, MassKind, SelectionMethod
from omnimem.selection.topk import keep_mask

COLUMNS = ("_keys", "_values", "_features")
STATE = ("table", "valid", "mass", "columns_seen", "is_initialized", "_new_mass", "_active")
"""Attributes that, beside the stored columns, make up the state of a layer between two steps."""


class Kept(NamedTuple):
    """What a compression kept.

    Attributes
    ----------
    columns : Tensor
        int64 ``[B, M]``: columns that stayed, in stream order; 0 where a shorter sample is padded.
    valid : Tensor
        bool ``[B, M]``: which of them are real.
    """

    columns: Tensor
    valid: Tensor

    @classmethod
    def of(cls, keep: Tensor) -> Kept:
        """From a bool mask ``[B, N]``."""
        lengths = keep.sum(1)
        width = int(lengths.max())
        # A stable sort of "dropped" puts the kept columns first and leaves them in stream order.
        columns = torch.sort((~keep).to(torch.int8), dim=1, stable=True).indices[:, :width]
        valid = torch.arange(width, device=keep.device)[None] < lengths[:, None]
        return cls(columns.masked_fill(~valid, 0), valid)


class CompressedLayer(CacheLayerMixin):
    """Key-value states of one decoder layer, bounded by its budget.

    Parameters
    ----------
    index : int
        Number of the layer.
    budget : LayerBudget
        Visual and audio positions kept by `compress`.
    method : SelectionMethod
        Scores the candidates and says what it needs to observe.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, index: int, budget: LayerBudget, method: SelectionMethod) -> None:
        super().__init__()
        self.index = index
        self.budget = budget
        self.method = method
        self.reset()

    def reset(self) -> None:
        """Forget everything, buffers included."""
        self._keys, self._values, self._features = Columns(2), Columns(2), Columns(1)
        # None until the first step, a PositionTable from then on.
        self.table: Any = None
        self.mass: Tensor | None = None
        self.columns_seen = 0
        self.is_initialized = False
        self._show()
        # Of the step under way: which columns are real, what it is to report, what it has reported.
        self.valid: Tensor | None = None
        self._observing = False
        self._next_table: PositionTable | None = None
        self._new_features: Tensor | None = None
        self._new_mass: Tensor | None = None
        self._active: Tensor | None = None

    def _show(self) -> None:
        """Publish the columns under the names transformers and selection methods know."""
        self.keys: Any = self._keys.tensor
        self.values: Any = self._values.tensor
        self.features: Tensor | None = self._features.tensor

    # ---- one forward step -------------------------------------------------------------------------------

    def begin(self, new: PositionTable, ragged: bool, observe: bool) -> None:
        """Announce the positions of the coming step.

        Parameters
        ----------
        new : PositionTable
            The T new positions.
        ragged : bool
            Whether any column, stored or new, may be padding.
        observe : bool
            Whether the step should report what selection needs to see.
        """
        self._accumulate()
        self._observing, self._new_features = observe, None
        self._next_table = joined = new if self.table is None else self.table.append(new)
        self.valid = joined.valid if ragged else None
        self._active = new.valid.any(1, keepdim=True) if ragged else None

    def observe_hidden(self, hidden: Tensor) -> None:
        """Take the layer's input hidden states ``[B, T, C]`` of the new positions."""
        if self.method.stores_features:
            self._new_features = self.method.features(hidden.detach(), self.index)

    @property
    def wants_mass(self) -> MassKind | None:
        """Kind of attention mass this step should report, None for none."""
        return self.method.mass_kind if self._observing else None

    def observe_mass(self, mass: Tensor) -> None:
        """Take the attention mass ``[B, N + T]`` the step gave to retained and new positions."""
        self._new_mass = mass

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append the states ``[B, G, T, D]`` of the announced positions and return all ``[B, G, N + T, D]``."""
        if self._next_table is None:
            raise RuntimeError(
                "a CompressedCache needs its hooks: call omnimem.memory.attach(language_model) before using it"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = key_states.shape[2]

        def bound() -> int | None:
            """Columns there can ever be after a step of this length; None without a budget."""
            if self.method.keeps_everything:
                return None
            text = 0 if self.table is None else int((self.table.modality == TEXT).any(0).sum())
            return self.budget.total + text + step

        self._keys.append(key_states, bound)
        self._values.append(value_states, bound)
        if self._new_features is not None:
            self._features.append(self._new_features, bound)
        self._show()
        self.table, self._next_table = self._next_table, None
        self.columns_seen += step
        return self.keys, self.values

    # ---- compaction -------------------------------------------------------------------------------------

    def compress(self) -> Kept | None:
        """Keep the budget's worth of visual and audio positions and all text; None where everything stayed."""
        self._accumulate()
        kept = self._decide()
        self._take(kept)
        return kept

    def replay(self, kept: Kept | None) -> Kept | None:
        """Keep what an earlier `compress` of the same state kept, without deciding again."""
        self._accumulate()
        self._take(kept)
        return kept

    @torch.no_grad()
    def _accumulate(self) -> None:
        """Fold the mass observed in the last step into the mass of every position."""
        if self.mass is None:
            self.mass, self._new_mass = self._new_mass, None
            return
        # Positions that came in a step that was not observed (text) start without mass.
        missing = len(self.table) - self.mass.shape[1]
        before = torch.nn.functional.pad(self.mass, (0, missing))
        if self._new_mass is None:
            self.mass = before
            return
        self.mass = self.method.accumulate(self.mass, self._new_mass)
        if self._active is not None:
            # A sample that had no query in this step has not had a step.
            self.mass = torch.where(self._active, self.mass, before)
        self._new_mass = None

    @torch.no_grad()
    def _decide(self) -> Kept | None:
        counts = self.counts()
        if self.method.keeps_everything or all(
            int(counts[name].max()) <= getattr(self.budget, name) for name in EVICTABLE
        ):
            # Nothing to evict; only the padding between a shorter sample and the step is squeezed out.
            return None if bool(self.table.valid.all()) else Kept.of(self.table.valid)
        return Kept.of(keep_mask(self.method.score(self.candidates()), self.table, self.budget))

    def candidates(self) -> Candidates:
        """Everything a selection method may look at, detached from autograd."""
        return Candidates(
            layer=self.index,
            budget=self.budget,
            keys=self.keys.detach(),
            values=self.values.detach(),
            table=self.table,
            mass=self.mass,
            features=self.features,
        )

    def _take(self, kept: Kept | None) -> None:
        """Reduce every stored tensor to the kept columns."""
        if kept is None:
            return
        for stored in (self._keys, self._values, self._features):
            if stored.tensor is not None:
                stored.take(kept.columns)
        self._show()
        self.table = self.table.gather(kept.columns, kept.valid)
        self.mass = None if self.mass is None else self.mass.gather(1, kept.columns)

    # ---- reading ----------------------------------------------------------------------------------------

    def counts(self) -> dict[str, Tensor]:
        """Stored positions per modality and sample: name → int64 ``[B]`` (text, visual, audio)."""
        kinds = {"text": TEXT, **EVICTABLE}
        if self.table is None:
            return {name: torch.zeros(1, dtype=torch.int64) for name in kinds}
        return {name: ((self.table.modality == kind) & self.table.valid).sum(1).cpu() for name, kind in kinds.items()}

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, features (whole buffers at inference), facts and attention mass."""
        facts = 0 if self.table is None else self.table.nbytes
        mass = 0 if self.mass is None else self.mass.nbytes
        return self._keys.nbytes + self._values.nbytes + self._features.nbytes + facts + mass

    @property
    def state_nbytes(self) -> int:
        """Bytes of the keys and values of stored positions alone."""
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes

    def state(self) -> dict[str, Any]:
        """Snapshot that `restore` takes back; valid until the next compaction in place."""
        columns = {name: getattr(self, name).state() for name in COLUMNS}
        return columns | {name: getattr(self, name) for name in STATE}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a snapshot: whatever was appended after it is forgotten."""
        for name in COLUMNS:
            getattr(self, name).restore(state[name])
        for name in STATE:
            setattr(self, name, state[name])
        self._show()
        self._next_table = self._new_features = None

    def get_seq_length(self) -> int:
        """Columns seen so far, evicted ones included: what generate() counts from (transformers.md, row 3)."""
        return self.columns_seen

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
        return self.columns_seen + query_length, 0

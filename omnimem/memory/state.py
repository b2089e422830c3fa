"""The state of one layer between two forward passes, and what the running forward pass adds to it.

`LayerState` is immutable: a step of the stream makes a new one from the old one (`append`, then
`omnimem.memory.eviction`), so a snapshot is a reference. Its tensors share one buffer at inference; see
`omnimem.memory.token_buffer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from omnimem.memory.codec import EncodedDtype, codecs
from omnimem.memory.margin import Margin
from omnimem.memory.token_buffer import TokenBuffer
from omnimem.token_metadata import TokenMetadata

BUFFERS = ("keys", "values", "features")
"""Fields of `LayerState` that are token buffers."""


@dataclass(frozen=True)
class LayerState:
    """N stored tokens of one layer in R rows (see `TokenMetadata`).

    Attributes
    ----------
    keys, values : TokenBuffer
        ``[R, G, N, D]``, or their bytes; keys without rotation under the position id policy ``compact``, else
        post-RoPE.
    features : TokenBuffer
        ``[R, N, F]`` what the selection method stores of the layer's input hidden states, if anything.
    metadata : TokenMetadata or None
        None before the first step.
    token_counts : tuple of dict
        Stored text, visual and audio tokens of each sample.
    attention_scores : Tensor or None
        ``[R, M]``, M ≤ N: accumulated attention scores; tokens of later unobserved steps have none yet.
    num_previous : int
        Tokens that remained after the last compression; the others are new.
    margin : Margin or None
        Training with the straight-through gradient: tokens evicted by the last compression.
    bias : Tensor or None
        Training with the soft gradient: ``[R, M]`` sum of the log gates so far, added to the logits of every token.
    """

    keys: TokenBuffer = field(default_factory=lambda: TokenBuffer(2))
    values: TokenBuffer = field(default_factory=lambda: TokenBuffer(2))
    features: TokenBuffer = field(default_factory=lambda: TokenBuffer(1))
    metadata: TokenMetadata | None = None
    token_counts: tuple[dict[str, int], ...] = ()
    attention_scores: Tensor | None = None
    num_previous: int = 0
    margin: Margin | None = None
    bias: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.metadata is None else len(self.metadata)

    def append(
        self,
        new: TokenMetadata,
        keys: Tensor,
        values: Tensor,
        features: Tensor | None,
        capacity: Callable[[], int | None],
    ) -> LayerState:
        """Add the tokens of a step after the stored ones; `capacity` as in `TokenBuffer.append`."""
        return replace(
            self,
            keys=self.keys.append(keys, capacity),
            values=self.values.append(values, capacity),
            features=self.features if features is None else self.features.append(features, capacity),
            metadata=new if self.metadata is None else self.metadata.append(new),
        )

    def with_codecs(self, kind: EncodedDtype, dim: int) -> LayerState:
        """The same state without tokens, whose keys and values of `dim` channels will be encoded."""
        keys, values = codecs(kind, dim)
        return replace(self, keys=TokenBuffer(2, codec=keys), values=TokenBuffer(2, codec=values))

    def settle(self, capacity: Callable[[], int | None]) -> LayerState:
        """Encode what is not yet encoded; see `TokenBuffer.settle`."""
        return replace(self, **{name: getattr(self, name).settle(capacity) for name in BUFFERS})

    def padded_scores(self) -> Tensor | None:
        """Attention scores ``[R, N]`` of all stored tokens, 0 for tokens of unobserved steps."""
        return None if self.attention_scores is None else _pad(self.attention_scores, len(self))

    def padded_bias(self) -> Tensor | None:
        """Bias ``[R, N]`` of all stored tokens, 0 for tokens of the running step."""
        return None if self.bias is None else _pad(self.bias, len(self))

    @property
    def without_tokens(self) -> LayerState:
        """The same state without keys, values and features, which `omnimem.memory.undo` restores."""
        return replace(self, **{name: getattr(self, name).empty for name in BUFFERS})

    @property
    def nbytes(self) -> int:
        """Bytes allocated: keys, values and features with their whole buffers, and what is stored beside them."""
        return sum(getattr(self, name).nbytes for name in BUFFERS) + self._nbytes_beside

    @property
    def resident_nbytes(self) -> int:
        """Bytes of the stored tokens: keys, values, features, metadata, attention scores, the margin."""
        return sum(getattr(self, name).stored_nbytes for name in BUFFERS) + self._nbytes_beside

    @property
    def _nbytes_beside(self) -> int:
        """Bytes of everything that is not in a token buffer."""
        margin = () if self.margin is None else (self.margin.keys, self.margin.values, self.margin.gates)
        beside = (self.metadata, self.attention_scores, self.bias, *margin)
        return sum(one.nbytes for one in beside if one is not None)

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the keys and values of stored tokens alone."""
        return self.keys.stored_nbytes + self.values.stored_nbytes


@dataclass
class Step:
    """The running forward pass of T new tokens, as one layer sees it.

    Attributes
    ----------
    new : TokenMetadata
        The new tokens, one row per sample.
    start : int
        Tokens stored before the step.
    observe : bool
        Whether the selection method observes this step.
    valid : Tensor or None
        bool ``[B, N + T]``: which stored and new columns are real; None: all.
    active : Tensor or None
        bool ``[B, 1]``: which samples have a real token in this step; None: all.
    features : Tensor or None
        ``[B, T, F]`` features of the new tokens.
    appended : bool
        Whether the states of the new tokens are stored already.
    """

    new: TokenMetadata
    start: int
    observe: bool
    valid: Tensor | None = None
    active: Tensor | None = None
    features: Tensor | None = None
    appended: bool = False


def _pad(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - values.shape[1]))

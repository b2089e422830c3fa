"""Trained heads: a small module per layer that says what a token is worth when it arrives.

`learned` and its rivals `dms`, `trim_kv` and `kvzap` differ in what a head computes and in how it is trained; making,
saving and loading heads (`omnimem.selection.heads_file`) is the same for all.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimem.errors import OmniMemError
from omnimem.selection.base import Arrival, Candidates, SelectionMethod
from omnimem.selection.feature_codec import FeatureCodec

REFERENCE_WIDTH = 64
"""Input width at which the output of a head is not rescaled; with it one learning rate serves all models."""


class TokenHead(nn.Module):
    """One number per token from its layer-normalised hidden state; 0 before training.

    Parameters
    ----------
    channels : int
        C, width of the hidden states.
    hidden : int
        Width of one hidden layer; 0: a linear head.
    bias : bool
        Whether a constant is added.
    """

    def __init__(self, channels: int, hidden: int = 0, bias: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(channels, hidden) if hidden else None
        self.outer = nn.Linear(hidden or channels, 1, bias=False)
        nn.init.zeros_(self.outer.weight)
        self.bias = nn.Parameter(torch.zeros(1)) if bias else None

    def value(self, states: Tensor) -> Tensor:
        """The number ``[B, T]`` for hidden states ``[B, T, C]``, in the dtype of the head."""
        normal = F.layer_norm(states.to(self.outer.weight.dtype), states.shape[-1:])
        if self.inner is not None:
            normal = F.gelu(self.inner(normal))
        # Adam changes every weight by about the learning rate, so without the factor z would change in proportion to C.
        z = self.outer(normal)[..., 0] * (REFERENCE_WIDTH / normal.shape[-1])
        return z if self.bias is None else z + self.bias

    def forward(self, states: Tensor) -> Any:
        """What `value` returns; subclasses may return more."""
        return self.value(states)


HeadT = TypeVar("HeadT", bound=TokenHead)


class HeadMethod(SelectionMethod, Generic[HeadT]):
    """A selection method with a trained head per layer.

    Attributes
    ----------
    heads : list of HeadT or None
        One per layer, see `new_heads`.
    without_heads : str
        Message of the error that a method without heads raises.
    """

    stores_features = True
    heads: list[HeadT] | None = None
    without_heads: ClassVar[str]

    def set_form(self, method: str, head_hidden_size: int, seed: int) -> None:
        """Set the width of the heads' hidden layer (0: linear) and the seed of their initial weights.

        Raises
        ------
        OmniMemError
            The width is negative.
        """
        if head_hidden_size < 0:
            raise OmniMemError(f"selection {method}: head_hidden_size must be at least 0, got {head_hidden_size!r}")
        self.head_hidden_size, self.seed = head_hidden_size, seed

    @abstractmethod
    def new_head(self, channels: int) -> HeadT:
        """Make the untrained head of one layer of width `channels`."""

    def new_heads(self, num_layers: int, channels: int, dtype: torch.dtype = torch.float32) -> list[HeadT]:
        """Make untrained heads for a decoder of `num_layers` layers of width `channels`, and use them."""
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            self.heads = [self.new_head(channels).to(dtype) for _ in range(num_layers)]
        return self.heads

    def head(self, layer: int) -> HeadT:
        """The head of a layer.

        Raises
        ------
        OmniMemError
            There are no heads yet.
        """
        if self.heads is None:
            raise OmniMemError(self.without_heads)
        return self.heads[layer]


class RetentionMethod(HeadMethod[TokenHead]):
    """A method whose score is a function of one number that a head computes when the token arrives.

    Parameters
    ----------
    head_hidden_size : int
        Width of one hidden layer of the head; 0: linear.
    seed : int
        Seed of the initial weights of a hidden layer.
    """

    feature_codec = FeatureCodec(columns=1, numbers=0)
    name: ClassVar[str]
    initial_bias: ClassVar[float] = 0.0
    """The number of every token before training."""

    def __init__(self, head_hidden_size: int = 0, seed: int = 0) -> None:
        self.set_form(self.name, head_hidden_size, seed)

    @property
    def without_heads(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Message of the error that a method without heads raises."""
        return f"selection.method={self.name} has no trained heads; give the file of trained heads (heads=...)"

    def new_head(self, channels: int) -> TokenHead:
        """Head of one layer, see `TokenHead`."""
        head = TokenHead(channels, self.head_hidden_size)
        assert head.bias is not None
        nn.init.constant_(head.bias, self.initial_bias)
        return head

    def features(self, arrival: Arrival) -> Tensor:
        """The head's number: ``[B, T, 1]``."""
        return self.head(arrival.layer)(arrival.hidden)[..., None]

    def score(self, candidates: Candidates) -> Tensor:
        """The stored number."""
        assert candidates.features is not None
        return candidates.features[..., 0]

    def settings(self) -> dict[str, Any]:
        """Form of the head."""
        return {"head_hidden_size": self.head_hidden_size, "seed": self.seed}


def ages(candidates: Candidates) -> Tensor:
    """Number of tokens since each candidate arrived ``[R, N]``; merged tokens count from their first."""
    assert candidates.features is not None
    index = candidates.metadata.index
    index = torch.where(index < 0, -1 - index, index)
    newest = index.masked_fill(~candidates.metadata.valid, 0).amax(1, keepdim=True)
    return (newest - index).clamp_min(0).to(candidates.features.dtype)

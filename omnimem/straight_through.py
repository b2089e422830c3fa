"""The straight-through estimator: a rounded value in the forward pass, the identity in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def straight_through(states: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, bit for bit, whose gradient goes to `states` unchanged; both have the same shape."""
    return _StraightThrough.apply(states, rounded)  # pyright: ignore[reportReturnType]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None

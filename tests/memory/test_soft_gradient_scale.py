"""The gain of the soft form weighs the gradient of its gates, and nothing of the forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omnimem.memory import SelectionGradient
from oracles import stream
from small_decoder import answer, distance, model, new_cache, streams, weight_gradients  # noqa: F401


@pytest.mark.parametrize("attention", [False, True])
def test_soft_gradients_of_the_gates_are_proportional_to_the_scale(model, attention):
    parts = streams(1)[:2]

    def at(gain: float) -> list[Tensor]:
        gradient = SelectionGradient("soft", gradient_scale=gain, through_attention=attention)
        return weight_gradients(model, new_cache(gradient, lambda_=1.0), parts, asked=(1,))

    constant, double, eightfold = at(0.0), at(2.0), at(8.0)
    steps = [[a - b for a, b in zip(one, constant, strict=True)] for one in (double, eightfold)]
    assert max(float(one.abs().max()) for one in steps[0]) > 1e-6
    assert distance([4 * one for one in steps[0]], steps[1]) <= 1e-10


@torch.no_grad()
def test_the_forward_pass_does_not_depend_on_the_gain(model):
    found = []
    for gain in (0.0, 1.0, 64.0):
        cache = new_cache(SelectionGradient("soft", gradient_scale=gain))
        stream(model, cache, streams(1))
        found.append(answer(model, cache))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])

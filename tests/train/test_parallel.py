"""The optimizer step of a process with a full copy of the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from train.parallel import ParallelStrategy


@pytest.mark.parametrize(("limit", "moved"), [(1.0, 1.0), (0.25, 0.25), (20.0, 13.0), (math.inf, 13.0)])
def test_the_norm_over_all_parameters_is_clipped_and_reported_unclipped(limit, moved):
    parameters = {
        "a": nn.Parameter(torch.zeros(2)),
        "b": nn.Parameter(torch.zeros(1)),
        "c": nn.Parameter(torch.ones(3)),
    }
    processes = ParallelStrategy(parameters, torch.optim.SGD(parameters.values(), lr=1.0), limit)
    parameters["a"].grad, parameters["b"].grad = torch.tensor([3.0, -4.0]), torch.tensor([12.0])  # norm 13; c has none
    assert processes.step(apply=True) == pytest.approx(13.0)
    step = torch.cat([parameters["a"].detach(), parameters["b"].detach()])
    assert step.norm().item() == pytest.approx(moved, rel=1e-5)
    assert torch.allclose(step / step.norm(), -torch.tensor([3.0, -4.0, 12.0]) / 13)
    assert torch.equal(parameters["c"].detach(), torch.ones(3))
    assert all(parameter.grad is None for parameter in parameters.values())


@pytest.mark.parametrize(("gradient", "wanted"), [(1.0, False), (math.nan, True), (math.inf, True)])
def test_a_step_that_is_not_applied_or_not_finite_changes_nothing(gradient, wanted):
    weight = nn.Parameter(torch.ones(2))
    processes = ParallelStrategy({"weight": weight}, torch.optim.SGD([weight], lr=1.0), 1.0)
    weight.grad = torch.tensor([gradient, 0.0])
    norm = processes.step(wanted)
    assert math.isfinite(norm) == math.isfinite(gradient)
    assert torch.equal(weight.detach(), torch.ones(2)) and weight.grad is None

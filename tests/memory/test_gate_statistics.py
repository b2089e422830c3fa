"""Numbers about the gates in the metrics: means of those kept and evicted, and how many are undecided."""

from __future__ import annotations

import pytest
import torch

from omnimem.budget import BudgetProfile, LayerBudget
from omnimem.memory import CompressedCache, SelectionGradient
from omnimem.memory.selection_gradient import gate_statistics
from omnimem.selection import build_selection


def cache() -> CompressedCache:
    return CompressedCache(BudgetProfile((LayerBudget(2, 1),) * 2), build_selection("omnimem"), SelectionGradient())


def test_there_are_none_before_something_was_evicted():
    assert cache().gate_statistics() is None


def test_they_are_counted_over_layers_steps_and_samples():
    """Text and padding are neither kept nor evicted, and a gate of 0.1 or 0.9 has decided."""
    memory = cache()
    first, second = memory.layers
    stays = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]]).bool()
    gone = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0]]).bool()
    gate = torch.tensor([[0.95, 0.9, 0.6, 0.4, 0.2, 0.1, 0.05, 0.5]], dtype=torch.float64)
    first.add_gate_statistics(gate_statistics(gate, stays, gone))
    first.add_gate_statistics(gate_statistics(gate[:, :4], stays[:, :4], gone[:, :4]))
    gate = torch.tensor([[0.85, 0.11], [0.91, 0.09]], dtype=torch.float64)
    second.add_gate_statistics(gate_statistics(gate, *both([[1, 0], [1, 0]])))
    retained = [0.95, 0.9, 0.6, 0.95, 0.9, 0.6, 0.85, 0.91]
    evicted = [0.4, 0.2, 0.1, 0.05, 0.4, 0.11, 0.09]
    undecided = [one for one in (*retained, *evicted) if 0.1 < one < 0.9]
    assert len(undecided) == 7
    assert memory.gate_statistics() == {
        "retained": pytest.approx(sum(retained) / len(retained)),
        "evicted": pytest.approx(sum(evicted) / len(evicted)),
        "undecided": pytest.approx(len(undecided) / (len(retained) + len(evicted))),
    }


def both(stays: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Who stays, and everybody else as gone."""
    mask = torch.tensor(stays).bool()
    return mask, ~mask

"""An evaluation shared between processes: every held-out stream counts once, whoever runs it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from omnimem.recipe import Recipe
from train.evaluation import Evaluation

LOSSES, TARGETS = [1.0, 10.0, 100.0, 1000.0, 10000.0], [1, 2, 3, 4, 50]


class Rank:
    """What an evaluation uses of an accelerator; `shared` collects what the ranks would sum."""

    device = torch.device("cpu")

    def __init__(self, index: int, count: int, shared: list[torch.Tensor]) -> None:
        self.process_index, self.num_processes, self._shared = index, count, shared

    def reduce(self, totals: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        self._shared.append(totals)
        return totals


class Objective:
    """Known losses; notes which streams were run, and in which mode."""

    def __init__(self) -> None:
        self.model, self.run = nn.Linear(1, 1), []

    def __call__(self, samples: list[int]) -> SimpleNamespace:
        (number,) = samples
        assert not self.model.training
        self.run.append(number)
        return SimpleNamespace(loss=torch.tensor(LOSSES[number]), targets=TARGETS[number])


def measured(streams: int, processes: int) -> tuple[float, list[list[int]]]:
    """The loss all processes arrive at, and the streams that each of them ran."""
    shared: list[torch.Tensor] = []
    runs = []
    for index in range(processes):
        objective = Objective()
        evaluation = Evaluation(Recipe(), Path("run"), list(range(streams)))  # pyright: ignore[reportArgumentType]
        evaluation.measure(objective, Rank(index, processes, shared))  # pyright: ignore[reportArgumentType]
        assert objective.model.training, "the run goes on in the mode it was in"
        runs.append(objective.run)
    loss, targets = torch.stack(shared).sum(0).tolist()
    return loss / targets, runs


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_every_stream_counts_once_and_all_processes_run_equally_many(streams, processes):
    found, runs = measured(streams, processes)
    assert found == pytest.approx(sum(LOSSES[:streams]) / sum(TARGETS[:streams]), rel=1e-6)
    # Under ZeRO-3 a process that ran fewer would keep the others waiting.
    assert {len(run) for run in runs} == {math.ceil(streams / processes)}
    assert {number for run in runs for number in run} == set(range(streams))


def test_without_an_answer_the_loss_is_not_a_number(monkeypatch):
    monkeypatch.setattr("test_evaluation_shares.TARGETS", [0] * 5)
    evaluation = Evaluation(Recipe(), Path("run"), [0])  # pyright: ignore[reportArgumentType]
    assert math.isnan(evaluation.measure(Objective(), Rank(0, 1, [])))  # pyright: ignore[reportArgumentType]

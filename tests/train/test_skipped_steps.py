"""Steps with a loss that is not finite are skipped."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from small_runs import (
    FLOWER,
    RABBIT,
    ROWS,
    adapter,
    arguments,
    lines,
    main,
    metrics,
    trained_run,
)
from train.loop import MAX_CONSECUTIVE_SKIPPED
from train.objective import StreamObjective


class Poisoned:
    """Replaces the loss by a value that is not finite at the given calls; records the adapter at each call."""

    def __init__(self, monkeypatch, calls: set[int], value: float = math.nan) -> None:
        self.weights: list[list[torch.Tensor]] = []
        genuine = StreamObjective.__call__

        def call(objective, *args):
            number = len(self.weights)
            self.weights.append([p.detach().clone() for p in objective.model.parameters() if p.requires_grad])
            result = genuine(objective, *args)
            return replace(result, loss=result.loss * value) if number in calls else result

        monkeypatch.setattr(StreamObjective, "__call__", call)

    def changed(self, step: int) -> bool:
        pairs = zip(self.weights[step], self.weights[step + 1], strict=True)
        return any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.long)])
def test_a_step_without_a_finite_loss_is_skipped(tmp_path, monkeypatch, value):
    poisoned = Poisoned(monkeypatch, {1, 2}, value)
    run = trained_run(tmp_path, "train.max_steps=5", "train.save_steps=100")
    assert [poisoned.changed(step) for step in range(4)] == [True, False, False, True]
    records = metrics(run)
    assert [record["skipped"] for record in records] == [False, True, True, False, False]
    assert [record["loss"] is None for record in records] == [False, True, True, False, False]
    assert all(torch.isfinite(value).all() for value in adapter(run).values())


@pytest.mark.long
def test_consecutive_skipped_steps_end_the_training_with_one_line(tmp_path, monkeypatch, capsys):
    Poisoned(monkeypatch, set(range(1, 100)))
    assert main(arguments(tmp_path, "train.max_steps=20", "train.save_steps=100")) != 0
    shown = lines(capsys.readouterr().err)
    assert "Traceback" not in " ".join(shown)
    assert len([line for line in shown if f"{MAX_CONSECUTIVE_SKIPPED} consecutive steps" in line]) == 1
    assert shown[-1].startswith("train: ") and (FLOWER in shown[-1] or RABBIT in shown[-1])
    # Step 1 and four skipped ones; the fifth in a row ends the run.
    flags = [record["skipped"] for record in metrics(tmp_path / "run")]
    assert flags == [False] + [True] * (MAX_CONSECUTIVE_SKIPPED - 1)


@pytest.mark.long
def test_skipped_steps_that_are_not_consecutive_do_not_end_the_training(tmp_path, monkeypatch):
    skipped = [1, 2, 3, 4, 6, 7, 8, 9]
    assert len(skipped) > MAX_CONSECUTIVE_SKIPPED
    Poisoned(monkeypatch, set(skipped))
    run = trained_run(tmp_path, "train.max_steps=11", "train.save_steps=100", "data.chunk_seconds=4", rows=ROWS[:1])
    assert [record["step"] - 1 for record in metrics(run) if record["skipped"]] == skipped

"""The cache of a step has the budget of that step, not the run's."""

from __future__ import annotations

import pytest

from small_runs import RABBIT, metrics, trained_run

ROWS = [{"media": RABBIT, "question": "What is seen?", "answer": "A toy rabbit."}]


def test_a_step_retains_the_budget_that_it_logs(tmp_path):
    """The clip has 48 visual and 195 audio tokens, so every layer is full at the end."""
    options = ("memory.start_budget=48", "memory.curriculum_ratio=1.0", "train.max_steps=3")
    records = metrics(trained_run(tmp_path, *options, rows=ROWS))
    budgets = [record["mean_budget"] for record in records]
    assert budgets[0] == 48 > budgets[1] > budgets[2] > 24
    for record in records:
        assert record["retained"]["visual"] + record["retained"]["audio"] == pytest.approx(record["mean_budget"])

"""The order of rows and the learning rate."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.manifest import Row
from omnimem.recipe import TrainConfig
from train.loop import learning_rate_ratio
from train.samples import Sample
from train.schedule import Schedule


def schedule(rows: int, *, processes: int = 1, shuffle: bool = True, **settings: Any) -> Schedule:
    samples = [Sample(Row(Path(str(i)), (), True, i, str(i)), ()) for i in range(rows)]
    return Schedule(samples, TrainConfig(**settings), shuffle, processes)


def names(batches: list[list[Sample]]) -> list[str]:
    return [sample.row.name for batch in batches for sample in batch]


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "processes"),
    [(7, 1, 1, 1), (7, 2, 1, 1), (5, 2, 3, 2), (3, 4, 2, 2), (1, 1, 1, 4)],
)
def test_every_row_occurs_once_per_epoch(rows, batch, accumulation, processes):
    epochs = batch * accumulation * processes  # so that the last step ends with an epoch
    made = schedule(
        rows,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        processes=processes,
        num_train_epochs=epochs,
    )
    assert made.steps == rows
    order = []
    for step in range(made.steps):
        for rank in range(processes):
            batches = made.batches(step, rank)
            assert [len(one) for one in batches] == [batch] * accumulation
            order += names(batches)
    for epoch in range(epochs):
        assert Counter(order[epoch * rows : (epoch + 1) * rows]) == Counter(str(i) for i in range(rows))
    assert made.epoch(made.steps) == epochs


def test_order_is_a_function_of_seed_and_step_alone():
    first, second = schedule(9, per_device_train_batch_size=2), schedule(9, per_device_train_batch_size=2)
    forwards = [names(first.batches(step, 0)) for step in range(20)]
    torch.manual_seed(123)
    backwards = [names(second.batches(step, 0)) for step in reversed(range(20))][::-1]
    assert forwards == backwards
    other = schedule(9, per_device_train_batch_size=2, seed=1)
    assert [names(other.batches(step, 0)) for step in range(20)] != forwards
    rows = [name for step in forwards for name in step]
    assert rows[:9] != rows[9:18], "the second pass is in another order"
    plain = schedule(4, shuffle=False)
    assert [names(plain.batches(step, 0))[0] for step in range(8)] == list("01230123")


def test_the_same_samples_in_the_same_step_on_any_number_of_ranks():
    one = schedule(5, gradient_accumulation_steps=4)
    two = schedule(5, gradient_accumulation_steps=2, processes=2)
    for step in range(10):
        assert names(one.batches(step, 0)) == names(two.batches(step, 0)) + names(two.batches(step, 1))
        assert one.answer_tokens(step) == two.answer_tokens(step)


def test_steps_follow_from_epochs_unless_given():
    assert schedule(10, per_device_train_batch_size=4, num_train_epochs=1.0).steps == 3
    assert schedule(10, num_train_epochs=0.01).steps == 1
    assert schedule(10, num_train_epochs=3, max_steps=2).steps == 2


def rates(steps: int, **settings: Any) -> list[float]:
    return [learning_rate_ratio(step, steps, TrainConfig(**settings)) for step in range(steps + 1)]


def test_learning_rate_has_linear_warmup_and_cosine_decay():
    found = rates(100, warmup_ratio=0.1, min_lr_rate=0.0)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(found) == found[9] == found[10] == 1.0
    assert all(later < earlier for earlier, later in pairwise(found[10:]))
    assert found[55] == pytest.approx(0.5)
    assert all(rate > 0 for rate in found[:100]) and found[100] == pytest.approx(0.0)
    assert rates(100, min_lr_rate=0.2)[100] == pytest.approx(0.2)
    assert rates(1, warmup_ratio=0.0)[0] == 1.0 and rates(1, warmup_ratio=1.0)[0] == 1.0
    assert rates(10, warmup_ratio=0.0)[0] == 1.0

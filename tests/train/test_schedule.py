"""Which rows a step trains on: an order given by seed and step, drawn once per epoch, tokenized on demand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_prep.manifest import Question, Row
from omnimem.recipe import TrainConfig
from train.samples import Sample, Samples, tokenize_row
from train.schedule import Schedule

SHAPES = [
    # rows, batch, accumulation, processes, seed
    (7, 1, 1, 1, 0),
    (7, 2, 1, 1, 3),
    (5, 2, 3, 2, 0),
    (3, 4, 2, 2, 1),
    (60, 7, 1, 2, 20),
]


def row(number: int, questions: int = 1) -> Row:
    asked = tuple(Question(f"What is seen in clip {number}?", f"Scene {number}." * (i + 1)) for i in range(questions))
    return Row(Path(f"{number}.mp4"), asked, True, number, f"{number}.mp4")


def schedule(samples, batch: int, accumulation: int, processes: int, seed: int, shuffle: bool = True) -> Schedule:
    config = TrainConfig(
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, seed=seed, num_train_epochs=4
    )
    return Schedule(samples, config, shuffle, processes)


def expected_number(number: int, rows: int, seed: int) -> int:
    """Row of the `number`-th sample of a run, with a new permutation for every sample."""
    epoch, place = divmod(number, rows)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()[place]


@pytest.fixture
def permutations(monkeypatch) -> list[int]:
    """Sizes of the permutations drawn since the test began."""
    drawn: list[int] = []
    genuine = torch.randperm

    def counted(size, *args, **kwargs):
        drawn.append(size)
        return genuine(size, *args, **kwargs)

    monkeypatch.setattr(torch, "randperm", counted)
    return drawn


@pytest.mark.parametrize(("rows", "batch", "accumulation", "processes", "seed"), SHAPES)
def test_the_order_equals_that_of_a_permutation_drawn_for_every_sample(rows, batch, accumulation, processes, seed):
    made = schedule([Sample(row(i), ()) for i in range(rows)], batch, accumulation, processes, seed)
    per_rank = batch * accumulation
    for step in (*range(made.steps), 0, made.steps - 1):  # backwards too: a resumed run begins anywhere
        for rank in range(processes):
            first = (step * processes + rank) * per_rank
            found = [sample.row.line for one in made.batches(step, rank) for sample in one]
            assert found == [expected_number(first + i, rows, seed) for i in range(per_rank)]


def test_one_permutation_is_drawn_per_epoch(permutations):
    made = schedule([Sample(row(i), ()) for i in range(64)], 2, 2, 2, 0)
    assert made.samples_per_step == 8
    for step in range(8):
        made.answer_tokens(step)
        for rank in range(2):
            made.batches(step, rank)
    assert permutations == [64]


def test_steps_across_two_epochs_draw_each_permutation_once(permutations):
    made = schedule([Sample(row(i), ()) for i in range(60)], 7, 1, 2, 0)
    steps = 13  # 182 samples: the fourth epoch has begun
    for step in range(steps):
        made.answer_tokens(step)
        for rank in range(2):
            made.batches(step, rank)
        made.answer_tokens(step)
    assert permutations == [60] * 4


def test_no_permutation_is_drawn_for_the_order_of_the_manifest(permutations):
    made = schedule([Sample(row(i), ()) for i in range(5)], 2, 1, 1, 0, shuffle=False)
    assert [sample.row.line for step in range(5) for (one,) in [made.batches(step, 0)] for sample in one] == [
        0, 1, 2, 3, 4, 0, 1, 2, 3, 4,
    ]  # fmt: skip
    assert not permutations


def test_rows_are_tokenized_when_a_step_needs_them(tiny, monkeypatch):
    rows = [row(i, questions=1 + i % 3) for i in range(40)]
    answers: list[str] = []
    genuine = type(tiny).answer_ids
    monkeypatch.setattr(type(tiny), "answer_ids", lambda self, text: answers.append(text) or genuine(self, text))

    made = schedule(Samples(rows, tiny), 2, 2, 2, 0)
    assert len(made.samples) == 40 and made.steps == 20 and made.epoch(5) == 1.0
    assert not answers, "nothing is tokenized before the first step"
    targets = made.answer_tokens(0)
    numbers = [expected_number(i, 40, 0) for i in range(8)]
    assert sorted(answers) == sorted(q.answer for n in numbers for q in rows[n].questions)
    assert targets == sum(genuine(tiny, q.answer).shape[1] for n in numbers for q in rows[n].questions)

    answers.clear()
    found = [sample for rank in range(2) for one in made.batches(0, rank) for sample in one]
    assert not answers, "what a step has counted it does not tokenize_row again"
    assert [sample.row for sample in found] == [rows[n] for n in numbers]
    for sample, number in zip(found, numbers, strict=True):
        for ours, theirs in zip(sample.questions, tokenize_row(rows[number], tiny).questions, strict=True):
            assert torch.equal(ours.question, theirs.question) and torch.equal(ours.answer, theirs.answer)
            assert ours.time == theirs.time

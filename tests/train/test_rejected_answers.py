"""Nothing trains on rejected answers, and a run says so: once, with their number."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from clips import RABBIT
from data_prep.manifest import read_manifest, rejected_answers
from small_runs import FLOWER, MEDIA, arguments, main, trained_run, weights_bytes, write_manifest
from train.data_stats import print_stats, stats

ROWS = [
    {"media": FLOWER, "question": "What is seen?", "answer": "A red flower."},
    {
        "media": RABBIT.name,
        "questions": [{"question": "What is seen?", "answer": "A rabbit."}, {"question": "Who?", "answer": "No one."}],
    },
]


def with_rejected(*rejected: str) -> list[dict[str, Any]]:
    """The rows, with a rejected answer for the first questions."""
    first, second = ROWS
    texts = [*rejected, *([None] * (3 - len(rejected)))]
    questions = [{**q, "rejected": text} for q, text in zip(second["questions"], texts[1:], strict=True)]
    return [{**first, "rejected": texts[0]}, {**second, "questions": questions}]


def test_they_are_counted_over_all_questions(tmp_path):
    for number in range(4):
        rows = with_rejected(*["Something else."] * number)
        assert rejected_answers(read_manifest(write_manifest(tmp_path / "a.jsonl", rows), MEDIA).rows) == number


def test_a_run_says_once_how_many_are_not_trained_on(tmp_path, caplog):
    args = arguments(tmp_path, "dry_run=true", rows=with_rejected("A blue one.", "A dog."))
    assert main(args) == 0
    (line,) = [line for line in caplog.messages if "rejected" in line]
    assert "2 rejected answers are not trained on" in line and "data.jsonl" in line
    caplog.clear()
    assert main(arguments(tmp_path, "dry_run=true", rows=ROWS)) == 0
    assert not [line for line in caplog.messages if "rejected" in line]


@pytest.mark.slow
def test_a_run_with_them_trains_what_one_without_them_trains(tmp_path):
    with_them = trained_run(tmp_path / "with", "train.max_steps=2", rows=with_rejected("A blue one.", "A dog.", "Bob."))
    without = trained_run(tmp_path / "without", "train.max_steps=2", rows=ROWS)
    assert weights_bytes(with_them) == weights_bytes(without)


def test_stats_count_them(tmp_path):
    shown = {}
    for name, rows in (("with", with_rejected("A blue one.")), ("without", ROWS)):
        found = stats(str(write_manifest(tmp_path / f"{name}.jsonl", rows)), MEDIA)
        console = Console(file=io.StringIO(), width=200)
        print_stats(found, console)
        said = "1 rejected answers, which nothing trains on" in console.file.getvalue()
        shown[name] = found["rows"]["rejected"], said
    assert shown == {"with": (1, True), "without": (0, False)}

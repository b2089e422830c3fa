"""Values exactly at a limit, and just beside it: which side of it they are on."""

from __future__ import annotations

import json
import os
from array import array
from fractions import Fraction
from pathlib import Path

import pytest

from data_prep.convert.table import seconds
from data_prep.manifest import MAX_QUESTION_TIME, BadRow, manifest_fingerprint, read_manifest
from data_prep.validate.tracks import backward_steps, is_variable
from omnimem.budget import BudgetProfile, LayerBudget
from omnimem.budget.allocation import DEFAULT_FLOOR, with_mean
from train.data_stats import DURATIONS, durations

MILLISECOND = Fraction(1, 1000)


def manifest(folder: Path, **row) -> Path:
    for name in ("clip.mp4", "talk.wav"):
        if not (folder / name).exists():
            (folder / name).write_bytes(b"bytes")
    path = folder / "set.jsonl"
    path.write_text(json.dumps({"media": "clip.mp4", "question": "Who?", "answer": "Ada.", **row}))
    return path


@pytest.mark.parametrize("time", [0, 0.0, 1e-9, MAX_QUESTION_TIME * (1 - 1e-15)])
def test_a_question_may_be_asked_from_the_first_second_on(tmp_path, time):
    (row,) = read_manifest(manifest(tmp_path, time=time)).rows
    assert row.questions[0].time == time


@pytest.mark.parametrize("time", [-1e-9, MAX_QUESTION_TIME])
def test_no_question_is_asked_before_it_or_in_milliseconds_since_1970(tmp_path, time):
    assert "time must be seconds" in read_failure(manifest(tmp_path, time=time))


def read_failure(path: Path) -> str:
    with pytest.raises(Exception, match=r"set\.jsonl:1") as failure:
        read_manifest(path)
    return str(failure.value)


def test_a_fingerprint_changes_with_the_size_of_either_file(tmp_path):
    """Runs are compared by it: another recording under the same name is other data."""
    path = manifest(tmp_path, audio_path="talk.wav")
    found = {manifest_fingerprint(read_manifest(path).rows)}
    for name in ("talk.wav", "clip.mp4"):
        (tmp_path / name).write_bytes(b"other bytes")
        found.add(manifest_fingerprint(read_manifest(path).rows))
    assert len(found) == 3
    os.utime(tmp_path / "clip.mp4", (1, 1))
    assert manifest_fingerprint(read_manifest(path).rows) in found, "a copy has other times and is the same data"


@pytest.mark.parametrize(
    ("text", "expected"), [("0:59.5", 59.5), ("59:59", 3599.0), ("75:30", 4530.0), ("1:59:59", 7199.0)]
)
def test_clocks_are_read_up_to_their_last_second(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["0:60", "1:60", "1:60:00", "1:00:60"])
def test_no_clock_shows_sixty(text):
    with pytest.raises(BadRow, match="mm:ss"):
        seconds(text)


@pytest.mark.parametrize(("number", "limit"), list(enumerate(limit for limit, _ in DURATIONS[:-1])))
def test_a_clip_as_long_as_the_limit_of_a_bin_is_in_the_next(number, limit):
    assert durations([float(limit)]) == {DURATIONS[number + 1][1]: 1}
    assert durations([limit - 1e-6]) == {DURATIONS[number][1]: 1}


def test_frames_at_the_same_time_go_backwards_too():
    """A player shows one of them only."""
    assert backward_steps(array("q", [0, 40, 80])) == 0
    assert backward_steps(array("q", [0, 40, 40, 80])) == 1
    assert backward_steps(array("q", [0, 40, 30, 80, 80])) == 2


@pytest.mark.parametrize(("frames", "dropped", "variable"), [(30, 1, False), (30, 2, True), (300, 3, True)])
def test_more_than_one_dropped_frame_or_a_hundredth_make_a_rate_variable(frames, dropped, variable):
    missing = {10 * (i + 1) for i in range(dropped)}
    times = array("q", [40 * i for i in range(frames) if i not in missing])
    assert is_variable(times, MILLISECOND) == variable


@pytest.mark.parametrize("smallest", [DEFAULT_FLOOR - 1, DEFAULT_FLOOR, DEFAULT_FLOOR + 1])
def test_budgets_at_the_floor_keep_it_when_they_shrink(smallest):
    """Only a profile that is below the floor already may go further below."""
    profile = BudgetProfile((LayerBudget(90, smallest), LayerBudget(200, 200)))
    smaller = with_mean(profile, 60)
    least = min(min(layer.visual, layer.audio) for layer in smaller.layers)
    assert smaller.mean_budget == 60
    assert least < DEFAULT_FLOOR if smallest < DEFAULT_FLOOR else least == DEFAULT_FLOOR

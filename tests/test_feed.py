"""Chunks decoded ahead by a thread: the same, in order, never more than asked for, errors where they belong."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from clips import MEDIA
from omnimem.media import MediaError, open_media
from small_runs import HALF, RABBIT, adapter, trained_run
from train.feed import ahead


@pytest.mark.parametrize("size", [0, 1, 3])
def test_chunks_are_those_of_the_reader(size):
    def chunks():
        return iter(open_media(MEDIA / RABBIT, fps=1.0, chunk_seconds=2.0))

    found, expected = list(ahead(chunks(), size)), list(chunks())
    assert [(one.t0, one.t1) for one in found] == [(one.t0, one.t1) for one in expected]
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(found, expected, strict=True))
    assert all(np.array_equal(a.audio, b.audio) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_no_more_are_made_than_may_wait(size):
    made = []
    source = (made.append(i) or i for i in range(100))
    consumer = ahead(source, size)
    assert next(consumer) == 0
    time.sleep(0.3)
    # Those that wait, and one in the hands of the thread.
    assert len(made) <= 1 + size + 1
    assert list(consumer) == list(range(1, 100))


def test_an_error_comes_where_its_chunk_would_have():
    def broken():
        yield 1
        yield 2
        raise MediaError("clip.mp4", "breaks off")

    found = []
    with pytest.raises(MediaError, match="breaks off"):
        for item in ahead(broken(), 4):
            found.append(item)
    assert found == [1, 2]


def test_a_consumer_that_stops_ends_the_thread():
    before = threading.active_count()
    consumer = ahead(iter(range(10**9)), 2)
    next(consumer)
    assert threading.active_count() == before + 1
    consumer.close()
    assert threading.active_count() == before


def test_runs_do_not_depend_on_it(tmp_path):
    runs = [trained_run(tmp_path, f"data.decode_ahead={n}", "train.max_steps=2", out=str(n)) for n in (0, 3)]
    one, other = (adapter(run) for run in runs)
    assert all((one[name] == other[name]).all() for name in one)


def test_a_damaged_clip_is_left_out_all_the_same(tmp_path):
    rows = [
        {"media": HALF, "question": "What is seen?", "answer": "A rabbit."},
        {"media": RABBIT, "question": "What is seen?", "answer": "A rabbit."},
    ]
    options = ("data.on_bad_row=skip", "data.shuffle=false", "train.max_steps=2", "data.decode_ahead=2")
    assert adapter(trained_run(tmp_path, *options, rows=rows))

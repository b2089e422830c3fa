"""Chunks decoded ahead by a thread: the same, in order, never more than asked for, errors where they belong."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from clips import MEDIA
from omnimem import stream_settings
from omnimem.backbones import Backbone
from omnimem.budget import BudgetProfile
from omnimem.calibrate import measure_clip
from omnimem.measure.meter import Meter
from omnimem.media import MediaError, open_media
from omnimem.media.prefetch import prefetch
from omnimem.stream import StreamingSession
from omnimem.stream_settings import StreamSettings
from small_runs import HALF, RABBIT, adapter, trained_run

PATIENCE = 20
"""Seconds after which something that another thread should have done counts as not done."""


@pytest.mark.parametrize("size", [0, 1, 3])
def test_chunks_are_those_of_the_reader(size):
    def chunks():
        return iter(open_media(MEDIA / RABBIT, fps=1.0, chunk_seconds=2.0))

    found, expected = list(prefetch(chunks(), size)), list(chunks())
    assert [(one.t0, one.t1) for one in found] == [(one.t0, one.t1) for one in expected]
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(found, expected, strict=True))
    assert all(np.array_equal(a.audio, b.audio) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_as_many_are_made_as_may_wait_and_no_more(size):
    made = [threading.Event() for _ in range(20)]
    consumer = prefetch((made[i].set() or i for i in range(20)), size)
    for i in range(10):
        assert next(consumer) == i
        assert made[i + size].wait(PATIENCE), "made while the consumer has another one"
    assert not made[10 + size].is_set()
    assert list(consumer) == list(range(10, 20))


@pytest.mark.parametrize("size", [0, 1, 4])
def test_an_error_comes_where_its_chunk_would_have(size):
    def broken():
        yield 1
        yield 2
        raise MediaError("clip.mp4", "breaks off")

    found = []
    with pytest.raises(MediaError, match="breaks off"):
        for item in prefetch(broken(), size):
            found.append(item)
    assert found == [1, 2]


def open_files() -> list[str]:
    """Files this process has open."""
    return [os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("size", [0, 1, 2])
def test_a_consumer_that_stops_ends_the_thread_and_closes_the_file(size):
    before = threading.active_count()
    clip = os.path.realpath(MEDIA / RABBIT)
    reader = open_media(clip, chunk_seconds=1.0)
    chunks = iter(reader)  # held here, so that nothing but `prefetch` closes it
    consumer = prefetch(chunks, size)
    next(consumer)
    assert clip in open_files()
    assert threading.active_count() == before + (size > 0)
    consumer.close()
    assert threading.active_count() == before
    assert clip not in open_files()
    assert next(chunks, None) is None


# ---- while the model is busy -----------------------------------------------------------------------------------------


class Reader:
    """A reader that notes each chunk it has decoded."""

    def __init__(self, reader, decoded, seconds):
        self.info, self._reader, self._decoded, self._seconds = reader.info, reader, decoded, seconds

    def __iter__(self):
        for chunk in self._reader:
            time.sleep(self._seconds)
            self._decoded[chunk.index].set()
            yield chunk


@pytest.fixture
def overlapping(monkeypatch):
    """Every step of the model waits until the chunk after it is decoded; the function sets the seconds of decoding."""
    slow = [0.0]
    decoded = [threading.Event() for _ in range(100)]
    real_open, real_begin = stream_settings.open_media, StreamSettings.stream_encoder

    def begin(self, info, backbone):
        encoder = real_begin(self, info, backbone)
        encode = encoder.encode

        def encode_when_the_next_is_decoded(chunk):
            waits = not chunk.last and slow[0] == 0
            assert not waits or decoded[chunk.index + 1].wait(PATIENCE), "not decoded while the model has this one"
            return encode(chunk)

        encoder.encode = encode_when_the_next_is_decoded
        return encoder

    monkeypatch.setattr(stream_settings, "open_media", lambda *a, **k: Reader(real_open(*a, **k), decoded, slow[0]))
    monkeypatch.setattr(StreamSettings, "stream_encoder", begin)
    return lambda seconds: slow.__setitem__(0, seconds)


SETTINGS = StreamSettings(chunk_seconds=2.0)


def new_session(backbone: Backbone) -> StreamingSession:
    return StreamingSession(backbone, BudgetProfile.uniform(backbone.config, mean=24, ratio=2.0), settings=SETTINGS)


def test_inference_decodes_a_chunk_while_the_model_takes_the_one_before(tiny, overlapping):
    assert len(list(new_session(tiny).watch(MEDIA / RABBIT))) == 4


def test_calibration_decodes_a_chunk_while_the_model_takes_the_one_before(tiny, overlapping):
    assert measure_clip(tiny, MEDIA / RABBIT, SETTINGS)


def test_measuring_decodes_a_chunk_while_the_model_takes_the_one_before(tiny, overlapping):
    with Meter(new_session(tiny)) as meter:
        assert len(list(meter.watch(MEDIA / RABBIT))) == 4


@pytest.mark.parametrize("loop_seconds", [None, 12.0])
def test_time_spent_waiting_for_a_chunk_is_not_that_of_a_step(tiny, overlapping, loop_seconds):
    overlapping(0.5)
    with Meter(new_session(tiny)) as meter:
        chunks = len(list(meter.watch(MEDIA / RABBIT, loop_seconds=loop_seconds)))
    assert chunks == (4 if loop_seconds is None else 6) and len(meter.step_seconds) == chunks - 1
    assert 0 < min(meter.step_seconds) < 0.25


def test_a_clip_that_breaks_off_gives_the_chunks_before(tiny):
    session, seen = new_session(tiny), []
    with pytest.raises(MediaError, match="cut off"):
        seen.extend(event.chunk for event in session.watch(MEDIA / HALF))
    expected = []
    with pytest.raises(MediaError):
        expected.extend(chunk.index for chunk in open_media(MEDIA / HALF, fps=1.0, chunk_seconds=2.0, short_side=360))
    assert expected  # otherwise nothing is shown
    session = new_session(tiny)
    events = session.watch(MEDIA / HALF)
    assert [next(events).chunk for _ in expected] == expected


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_stream_that_is_left_early_closes_its_file(tiny):
    before = threading.active_count()
    clip = os.path.realpath(MEDIA / RABBIT)
    events = new_session(tiny).watch(clip)
    next(events)
    events.close()
    assert threading.active_count() == before and clip not in open_files()


# ---- in training -----------------------------------------------------------------------------------------------------


def test_runs_do_not_depend_on_it(tmp_path):
    runs = [trained_run(tmp_path, f"data.prefetch_chunks={n}", "train.max_steps=2", out=str(n)) for n in (0, 3)]
    one, other = (adapter(run) for run in runs)
    assert all((one[name] == other[name]).all() for name in one)


def test_a_damaged_clip_is_left_out_all_the_same(tmp_path):
    rows = [
        {"media": HALF, "question": "What is seen?", "answer": "A rabbit."},
        {"media": RABBIT, "question": "What is seen?", "answer": "A rabbit."},
    ]
    options = ("data.on_bad_row=skip", "data.shuffle=false", "train.max_steps=2", "data.prefetch_chunks=2")
    assert adapter(trained_run(tmp_path, *options, rows=rows))

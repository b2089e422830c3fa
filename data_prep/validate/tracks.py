"""Every track of a file read to its end: pictures, samples, times, and where decoding fails.

Unlike `omnimem.media`, which decodes what a model will see, this decodes everything, one thread a file, because
damage can be anywhere. Many decoders repair what they can and only log it: those lines are counted, too.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import av.logging
import numpy as np
from av.audio.frame import AudioFrame
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame

from omnimem.media.container import is_cut_short, open_container, reason
from omnimem.media.selective_decoder import is_shown
from omnimem.media.tracks import STILLS

QUIET = 2.0**-15  # of full scale: one step of 16-bit sound


@dataclass
class Track:
    """One picture or sound track; times are seconds on the file's own clock."""

    index: int
    kind: str  # video or audio
    codec: str
    still: bool  # cover art
    frames: int = 0
    samples: int | None = None  # of sound, per channel; None where nothing was decoded
    first: Fraction | None = None
    end: Fraction | None = None
    error: tuple[Fraction, str] | None = None  # where and why the picture cannot be decoded further
    damaged: int = 0  # packets that could not be decoded, or only with repairs
    damaged_at: Fraction | None = None  # the first of them
    hidden: int = 0  # pictures an edit list leaves out
    before_key: int = 0  # pictures before the first key frame
    silent: bool | None = None  # None where nothing was decoded
    times: array[int] = field(default_factory=lambda: array("q"))  # of pictures, in ticks, as they came
    tick: Fraction = Fraction(1)
    cut_short: bool = False
    untimed: bool = False  # pictures without a time of their own

    def record(self, zero: Fraction, used: bool) -> dict[str, Any]:
        """As it stands in the report; seconds count from the clip's time zero."""
        entry: dict[str, Any] = {"index": self.index, "kind": self.kind, "codec": self.codec, "used": used}
        entry["frames"] = self.frames
        if self.samples is not None:
            entry["samples"] = self.samples
        if self.end is not None and not self.still:
            entry["seconds"] = round(float(self.end - zero), 3)
        if self.error is not None:
            entry["error"] = {"second": round(float(self.error[0] - zero), 3), "reason": self.error[1]}
        if self.damaged:
            entry["damaged_packets"] = self.damaged
        return entry


def read_tracks(path: Path, fast: bool) -> tuple[list[Track], str | None]:
    """Read all picture and sound tracks of a file to the end.

    Parameters
    ----------
    path : Path
    fast : bool
        Read the packets' times only, decode nothing.

    Returns
    -------
    tuple
        The tracks, and why reading (not decoding) ended early, if it did.
    """
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # a repeated line would be reported with the next file
    try:
        with av.logging.Capture(local=False) as logs, open_container(path) as container:
            return _read(container, fast, logs)
    finally:
        av.logging.set_skip_repeated(True)
        av.logging.set_level(level)


def _read(container: InputContainer, fast: bool, logs: list[Any]) -> tuple[list[Track], str | None]:
    streams = {s.index: s for s in (*container.streams.video, *container.streams.audio) if s.codec_context}
    readers: dict[int, _Reader] = {}
    for index, stream in streams.items():
        # One thread: many files are read at once, and what is logged belongs to the packet just sent.
        stream.codec_context.thread_count = 1
        still = stream.type == "video" and bool(stream.disposition & STILLS)
        track = Track(index, stream.type, stream.codec_context.name, still, tick=stream.time_base or Fraction(1))
        readers[index] = _Reader(track, stream, logs)
    failure = None
    try:
        for packet in container.demux(list(streams.values())):
            if packet.size:
                readers[packet.stream_index].take(packet, fast)
    except FFmpegError as error:
        failure = reason(error)
    for index, reader in readers.items():
        if not fast:
            reader.finish()
        reader.track.cut_short = not reader.track.still and is_cut_short(container, streams[index])
    return [readers[index].track for index in sorted(readers)], failure


class _Reader:
    """Takes the packets of one track."""

    def __init__(self, track: Track, stream: Any, logs: list[Any]) -> None:
        self.track = track
        self._codec = stream.codec_context
        self._logs = logs
        self._started = stream.type != "video"  # pictures can be decoded from a key frame on
        rate = stream.type == "video" and (stream.guessed_rate or stream.average_rate)
        self._period = 1 / Fraction(rate) if rate else Fraction(0)

    def take(self, packet: Packet, fast: bool) -> None:
        track = self.track
        self._started = self._started or packet.is_keyframe
        if not self._started:
            track.before_key += 1
            return
        if track.kind == "video" and packet.is_discard:
            track.hidden += 1
        if not fast:
            self._decode(packet)
        elif not packet.is_discard and (track.kind != "video" or is_shown(packet, track.codec)):
            track.frames += 1
            self._place(packet.pts, None if packet.duration is None else packet.duration * track.tick)
            if packet.is_corrupt:
                self._damage(packet.pts)

    def finish(self) -> None:
        """Take what the decoder still holds."""
        if self.track.error is None and self._started and self._codec.is_open:
            self._decode(None)

    def _decode(self, packet: Packet | None) -> None:
        track = self.track
        if track.error is not None:
            return
        del self._logs[:]
        at = None if packet is None else packet.pts
        try:
            frames = self._codec.decode(packet)
        except FFmpegError as error:
            if track.kind == "video":
                where = Fraction(0) if at is None else at * track.tick
                track.error = (where if track.end is None else track.end, reason(error))
            elif packet is not None:
                self._damage(at)
            return
        if self._logs or any(frame.is_corrupt for frame in frames):
            self._damage(at)
        for frame in frames:
            self._count(frame)

    def _count(self, frame: VideoFrame | AudioFrame) -> None:
        track = self.track
        track.frames += 1
        if isinstance(frame, AudioFrame):
            track.samples = (track.samples or 0) + frame.samples
            if track.silent is not False:  # the first sound settles it
                track.silent = is_quiet(frame.to_ndarray())
            length = Fraction(frame.samples, frame.sample_rate)
        else:
            length = None if not frame.duration else frame.duration * track.tick
        self._place(frame.pts, length)

    def _place(self, pts: int | None, length: Fraction | None) -> None:
        """Note when a frame is shown or heard; without a time of its own it follows the one before."""
        track = self.track
        if pts is None:
            track.untimed = True
            start = track.end or Fraction(0)
        else:
            start = pts * track.tick
            if track.kind == "video":
                track.times.append(pts)
        track.first = start if track.first is None else min(track.first, start)
        end = start + (length or self._period)
        track.end = end if track.end is None else max(track.end, end)

    def _damage(self, pts: int | None) -> None:
        track = self.track
        track.damaged += 1
        if track.damaged_at is None:
            track.damaged_at = (track.end or Fraction(0)) if pts is None else pts * track.tick


def is_quiet(samples: np.ndarray) -> bool:
    """Whether decoded samples (any sample format) are all nothing, to 16 bits."""
    if samples.dtype.kind == "f":
        return not bool((np.abs(samples) >= QUIET).any())
    middle = 128 if samples.dtype.kind == "u" else 0
    scale = float(np.iinfo(samples.dtype).max) + 1 - middle
    return not bool((np.abs(samples.astype(np.float64) - middle) >= QUIET * scale).any())


def is_variable(times: array[int], tick: Fraction) -> bool:
    """Whether pictures are unevenly spaced: more than 1 % of the steps are off the median by 10 % and 2 ms.

    A container that rounds to milliseconds, one dropped picture or one pause do not make a rate variable.
    """
    steps = _steps(times)
    total = sum(steps.values())
    if total < 2:
        return False
    median = _median(steps, total)
    odd = sum(n for step, n in steps.items() if abs(step - median) * tick > max(Fraction(2, 1000), median * tick / 10))
    return odd > max(1, total / 100)


def step_range(times: array[int], tick: Fraction) -> tuple[float, float]:
    """Shortest and longest step between pictures, in seconds."""
    steps = _steps(times)
    return float(min(steps) * tick), float(max(steps) * tick)


def backward_steps(times: array[int]) -> int:
    """Pictures that come at or before the time of the one before them, in the order of decoding."""
    return sum(1 for before, after in _pairs(times) if after <= before)


def _steps(times: array[int]) -> Counter[int]:
    return Counter(after - before for before, after in _pairs(array("q", sorted(times))))


def _median(steps: Counter[int], total: int) -> int:
    seen = 0
    for step, count in sorted(steps.items()):
        seen += count
        if 2 * seen >= total:
            return step
    return 0


def _pairs(times: array[int]) -> Iterator[tuple[int, int]]:
    return pairwise(times)

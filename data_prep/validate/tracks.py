"""Read every track of a file to its end: frames, samples, timestamps, and where decoding fails.

`omnimem.media` decodes only the frames a model uses; this module decodes everything, one thread per file: damage can
be anywhere. Many decoders conceal damage and only log it, so their log lines are counted as damage.
"""

from __future__ import annotations

from array import array
from collections import Counter
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

from omnimem.media.container import is_truncated, open_container, reason
from omnimem.media.selective_decoder import is_shown
from omnimem.media.tracks import STILLS

SILENCE = 2.0**-15  # of full scale: one quantisation step of 16-bit audio


@dataclass
class Track:
    """One video or audio track; times are seconds on the file's own clock."""

    index: int
    kind: str  # video or audio
    codec: str
    still: bool  # cover art
    frames: int = 0
    samples: int | None = None  # of audio, per channel; None if nothing was decoded
    first: Fraction | None = None
    end: Fraction | None = None
    error: tuple[Fraction, str] | None = None  # where and why decoding of the video stopped
    damaged: int = 0  # packets that could not be decoded, or only with concealment
    damaged_at: Fraction | None = None  # time of the first of them
    hidden: int = 0  # frames hidden by an edit list
    before_key: int = 0  # frames before the first key frame
    silent: bool | None = None  # None if nothing was decoded
    times: array[int] = field(default_factory=lambda: array("q"))  # of frames, in ticks, in decoding order
    tick: Fraction = Fraction(1)
    truncated: bool = False
    untimed: bool = False  # some frames have no timestamp

    def record(self, zero: Fraction, used: bool) -> dict[str, Any]:
        """The track as an entry of the report; seconds count from the clip's time zero."""
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
    """Read all video and audio tracks of a file to the end.

    Parameters
    ----------
    path : Path
    fast : bool
        Read the timestamps of packets only, decode nothing.

    Returns
    -------
    tuple
        The tracks, and the error that stopped reading (not decoding) early, if any.
    """
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # else a suppressed repetition would be logged with the next file
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
        # One thread: files are checked in parallel, and log lines must belong to the packet just sent.
        stream.codec_context.thread_count = 1
        still = stream.type == "video" and bool(stream.disposition & STILLS)
        track = Track(index, stream.type, stream.codec_context.name, still, tick=stream.time_base or Fraction(1))
        readers[index] = _Reader(track, stream, logs)
    failure = None
    try:
        for packet in container.demux(list(streams.values())):
            if packet.size:
                readers[packet.stream_index].read(packet, fast)
    except FFmpegError as error:
        failure = reason(error)
    for index, reader in readers.items():
        if not fast:
            reader.finish()
        reader.track.truncated = not reader.track.still and is_truncated(container, streams[index])
    return [readers[index].track for index in sorted(readers)], failure


class _Reader:
    """Reads the packets of one track."""

    def __init__(self, track: Track, stream: Any, logs: list[Any]) -> None:
        self.track = track
        self._codec = stream.codec_context
        self._logs = logs
        self._started = stream.type != "video"  # video can be decoded from the first key frame on
        rate = stream.type == "video" and (stream.guessed_rate or stream.average_rate)
        self._period = 1 / Fraction(rate) if rate else Fraction(0)

    def read(self, packet: Packet, fast: bool) -> None:
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
            self._add_time(packet.pts, None if packet.duration is None else packet.duration * track.tick)
            if packet.is_corrupt:
                self._damage(packet.pts)

    def finish(self) -> None:
        """Drain the decoder."""
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
            if track.silent is not False:  # the first audible sample settles it
                track.silent = is_silent(frame.to_ndarray())
            length = Fraction(frame.samples, frame.sample_rate)
        else:
            length = None if not frame.duration else frame.duration * track.tick
        self._add_time(frame.pts, length)

    def _add_time(self, pts: int | None, length: Fraction | None) -> None:
        """Record when a frame starts and ends; without a timestamp it follows the previous frame."""
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


def is_silent(samples: np.ndarray) -> bool:
    """Whether decoded samples (any sample format) are all zero at 16-bit precision."""
    if samples.dtype.kind == "f":
        return not bool((np.abs(samples) >= SILENCE).any())
    middle = 128 if samples.dtype.kind == "u" else 0
    scale = float(np.iinfo(samples.dtype).max) + 1 - middle
    return not bool((np.abs(samples.astype(np.float64) - middle) >= SILENCE * scale).any())


def is_variable(times: array[int], tick: Fraction) -> bool:
    """Whether the frame rate varies: more than 1 % of the steps differ from the median by 10 % and 2 ms.

    Timestamps rounded to milliseconds, one dropped frame or one pause do not count as a variable frame rate.
    """
    steps = _steps(times)
    total = sum(steps.values())
    if total < 2:
        return False
    median = _median(steps, total)
    irregular = sum(
        n for step, n in steps.items() if abs(step - median) * tick > max(Fraction(2, 1000), median * tick / 10)
    )
    return irregular > max(1, total / 100)


def step_range(times: array[int], tick: Fraction) -> tuple[float, float]:
    """Shortest and longest step between frames, in seconds."""
    steps = _steps(times)
    return float(min(steps) * tick), float(max(steps) * tick)


def backward_steps(times: array[int]) -> int:
    """Number of frames whose timestamp does not exceed that of the previous frame, in decoding order."""
    return sum(1 for before, after in pairwise(times) if after <= before)


def _steps(times: array[int]) -> Counter[int]:
    return Counter(after - before for before, after in pairwise(sorted(times)))


def _median(steps: Counter[int], total: int) -> int:
    seen = 0
    for step, count in sorted(steps.items()):
        seen += count
        if 2 * seen >= total:
            return step
    return 0

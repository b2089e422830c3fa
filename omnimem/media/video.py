"""Sample the frames of a video stream at a fixed rate, one at a time.

Models use 1 or 2 frames per second; the frame of instant ``i / fps`` is the one that a player shows then. If the
timestamps allow it, only the needed frames are decoded (`selective_decoder`); otherwise all are, with the same result.

    python tests/benchmarks/decode.py
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator
from fractions import Fraction

import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from .container import discard_other_streams, is_truncated, open_container, reason
from .frame_layout import FrameLayout
from .plan import FramePlan, PlanImpossible
from .probe import Source
from .selective_decoder import RESTARTABLE, DecodeStats, SelectiveDecoder, is_shown

log = logging.getLogger("omnimem.media")

TOLERANCE = Fraction(1, 1000)  # seconds; containers round times to milliseconds


class VideoSampler:
    """The frames shown at ``i / fps`` seconds after time zero, until the end of the video.

    Parameters
    ----------
    source : Source
        File with a video stream.
    fps : Fraction
        Sampling instants per second.
    count : int or None
        Maximum number of instants.
    on_fault : callable
        ``on_fault(seconds_reached, cause)`` is called when decoding fails; if it returns, the video ends there.

    Attributes
    ----------
    end : Fraction or None
        End of the video in seconds after time zero; None until the stream is read to its end.
    truncated : bool
        Whether the file ends before data that its index refers to.
    """

    def __init__(
        self, source: Source, fps: Fraction, count: int | None, on_fault: Callable[[Fraction, str], None]
    ) -> None:
        assert source.info.video_index is not None and source.layout is not None
        self.source = source
        self.fps = fps
        self.count = count
        self.on_fault = on_fault
        self.end: Fraction | None = None
        self.truncated = False
        self.stats = DecodeStats()
        self._layout: FrameLayout = source.layout
        self._end_ticks = 0
        self._tick = Fraction(1)
        self._period = 0  # ticks per frame, where the file states no duration
        self._by_count = False  # ignore timestamps: frames follow each other at the average rate
        self._read_error: FFmpegError | None = None

    def frames(self) -> Generator[np.ndarray, None, None]:
        """Yield uint8 ``[H, W, 3]`` for instants 0, 1, 2, …; the same array may come several times."""
        given = 0
        try:
            for image in self._needed_only():
                yield image
                given += 1
        except PlanImpossible as why:
            log.info("%s: decoding every frame (%s)", self.source.path.name, why)
            yield from self._every(given)

    def instants_before(self, end: Fraction) -> int:
        """Number of instants before ``end`` (seconds after time zero); at least one."""
        return max(1, math.ceil((end - TOLERANCE) * self.fps))

    def _limit(self, instant: int) -> int:
        """Latest presentation time (ticks) of a frame shown at an instant."""
        return math.floor((self.source.zero + instant / self.fps + TOLERANCE) / self._tick)

    def _needed_only(self) -> Iterator[np.ndarray]:
        """Decode needed frames only; raises PlanImpossible if all must be decoded."""
        with open_container(self.source.path) as container:
            stream = self._start(container)
            if self.source.info.video_codec not in RESTARTABLE:
                raise PlanImpossible(f"{self.source.info.video_codec} video")
            if self.source.first_pts is None or self._by_count:
                raise PlanImpossible("no presentation times")
            plan = FramePlan(self._limit, self.source.first_pts, self.count)
            decoder = SelectiveDecoder(stream, plan, self._layout, self.stats)
            yield from decoder.frames(self._packets(container, stream))
            if decoder.broken is None and plan.done:
                yield from decoder.finish(plan.settled)
            elif decoder.broken is None:
                self._finish(container, stream)
                yield from decoder.finish(self.instants_before(self.end or Fraction(0)))
            if decoder.broken is not None:
                ticks, error = decoder.broken
                self._fail(ticks, error)
            elif self._read_error is not None:
                self._fail(self._end_ticks, self._read_error)

    def _every(self, instant: int) -> Iterator[np.ndarray]:
        """Decode all frames; yield those shown at ``instant`` and later."""
        with open_container(self.source.path) as container:
            stream = self._start(container)
            held: VideoFrame | None = None
            for frame, pts in self._decode(container, stream):
                if held is not None and self._limit(instant) < pts:
                    image = self._convert(held)
                    while self._limit(instant) < pts and instant != self.count:
                        yield image
                        instant += 1
                if instant == self.count:
                    return
                held = frame
            if self.end is None:
                self._finish(container, stream)
            if held is None:
                return
            image = self._convert(held)
            while instant < self.instants_before(self.end or Fraction(0)) and instant != self.count:
                yield image
                instant += 1

    def _decode(self, container: InputContainer, stream: VideoStream) -> Iterator[tuple[VideoFrame, int]]:
        """All frames with their presentation times; computed from the average rate where the file has none."""
        clock = self._end_ticks
        failure: FFmpegError | None = None
        packets = self._packets(container, stream, measure=False)
        while True:
            packet = next(packets, None) if failure is None else None
            try:
                self.stats.sent += packet is not None
                frames = stream.codec_context.decode(packet)
            except FFmpegError as error:
                failure, packet, frames = error, Packet(0), []
            for frame in frames:
                self.stats.decoded += 1
                pts = clock if frame.pts is None or self._by_count else frame.pts
                clock = pts + self._period
                self._end_ticks = max(self._end_ticks, pts + (frame.duration or self._period))
                yield frame, pts
            if packet is None:
                break
        failure = failure or self._read_error
        if failure is not None:
            self._fail(self._end_ticks, failure)

    def _start(self, container: InputContainer) -> VideoStream:
        """Reset the state for reading the stream from its start."""
        stream = container.streams[self.source.info.video_index or 0]
        assert isinstance(stream, VideoStream) and stream.time_base is not None
        discard_other_streams(container, stream)
        self._tick = stream.time_base
        self._period = round(1 / (stream.guessed_rate or stream.average_rate or 25) / stream.time_base)
        self._end_ticks = self.source.first_pts or 0
        self._read_error = None
        # AVI stores no presentation times, and FFmpeg does not reconstruct those of reordered frames.
        self._by_count = container.format.name == "avi" and stream.codec_context.has_b_frames
        return stream

    def _packets(self, container: InputContainer, stream: VideoStream, measure: bool = True) -> Iterator[Packet]:
        """Packets of the stream from its first key frame on; stores a reading error, which ends them."""
        started = False
        try:
            for packet in container.demux(stream):
                started = started or packet.is_keyframe
                if packet.size == 0 or not started:
                    continue
                self.stats.packets += 1
                if measure and packet.pts is not None and is_shown(packet, stream.codec_context.name):
                    self._end_ticks = max(self._end_ticks, packet.pts + (packet.duration or self._period))
                yield packet
        except FFmpegError as error:
            self._read_error = error

    def _finish(self, container: InputContainer, stream: VideoStream) -> None:
        """Record the end of the video."""
        self.end = self._end_ticks * self._tick - self.source.zero
        self.truncated = is_truncated(container, stream)

    def _fail(self, ticks: int, error: FFmpegError) -> None:
        """End the video at ``ticks`` because of an error."""
        self.end = ticks * self._tick - self.source.zero
        self.on_fault(self.end, reason(error))

    def _convert(self, frame: VideoFrame) -> np.ndarray:
        """Decoded frame to uint8 ``[H, W, 3]``."""
        self.stats.converted += 1
        return self._layout.rgb(frame)

"""Decode an audio stream to one timeline of 16 kHz mono samples, aligned with the video by timestamps.

Audio tracks may start late, have gaps and overlaps, and change their sample format midway. Here sample ``n`` always
plays ``n / 16000`` seconds after the clip's time zero: gaps become silence, overlaps are cut.

    python -c "from omnimem.media import open_media; [print(len(c.audio)) for c in open_media('a.flac')]"
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from fractions import Fraction

import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError

from .container import discard_other_streams, is_truncated, open_container, reason
from .probe import Source

log = logging.getLogger("omnimem.media")

RATE = 16_000  # samples per second
GAP = Fraction(20, 1000)  # seconds; larger deviations of timestamps shift the audio, smaller ones are rounding
# Without this, floating point output is not normalized: a mix of two channels would reach 1.41.
MIX = {"rematrix_maxval": "1.0"}
BLOCK = RATE  # maximum number of samples of silence per block


class AudioTimeline:
    """Blocks of float32 samples, contiguous from time zero.

    Parameters
    ----------
    source : Source
        File with an audio stream.
    on_fault : callable
        ``on_fault(seconds_reached, cause)`` is called when reading fails; if it returns, the audio ends there.
        Packets that cannot be decoded are replaced by silence, with one warning.
    """

    def __init__(self, source: Source, on_fault: Callable[[Fraction, str], None]) -> None:
        self.source = source
        self.on_fault = on_fault
        self.truncated = False
        self._written = 0
        self._last_samples: int | None = None  # samples of the final frame that are presented

    def blocks(self) -> Generator[np.ndarray, None, None]:
        """Yield float32 ``[n]``, ``n`` > 0, until the audio ends."""
        run: _Run | None = None
        with open_container(self.source.path) as container:
            stream = container.streams[self.source.info.audio_index or 0]
            assert isinstance(stream, AudioStream)
            discard_other_streams(container, stream)
            for frame in self._frames(container, stream):
                at = self._time(frame)
                if run is not None and not run.continues(frame, at):
                    yield from self._place(run.at, run.finish())
                    at, run = run.end if at is None else at, None
                if run is None:
                    run = _Run(frame, Fraction(0) if at is None else at)
                yield from self._place(run.at, run.push(frame))
            if run is not None:
                yield from self._place(run.at, run.finish(self._last_samples))
            self.truncated = is_truncated(container, stream)

    def _time(self, frame: AudioFrame) -> Fraction | None:
        """Seconds after time zero; None for a frame without timestamp."""
        if frame.pts is None or frame.time_base is None:
            return None
        return frame.pts * frame.time_base - self.source.zero

    def _frames(self, container: InputContainer, stream: AudioStream) -> Iterator[AudioFrame]:
        """Decode all packets; log the number of damaged ones."""
        damaged = 0
        try:
            for packet in container.demux(stream):
                try:
                    frames = stream.codec_context.decode(packet if packet.size else None)
                except FFmpegError:
                    damaged += 1
                    continue
                if frames and packet.size and packet.duration and stream.time_base == Fraction(1, stream.rate):
                    # MP4: a shorter duration of the last packet cuts the padding of the last frame.
                    self._last_samples = packet.duration if packet.duration < frames[-1].samples else None
                elif frames:
                    self._last_samples = None
                yield from frames
        except FFmpegError as error:
            self.on_fault(Fraction(self._written, RATE), reason(error))
        if damaged:
            log.warning("%s: %d damaged audio packets replaced by silence", self.source.path.name, damaged)

    def _place(self, at: int, samples: np.ndarray) -> Iterator[np.ndarray]:
        """Yield samples that start at sample ``at`` of the timeline: silence before them, overlap cut."""
        samples = samples[max(self._written - at, 0) :]
        if len(samples) == 0:
            return
        while self._written < at:
            silence = np.zeros(min(at - self._written, BLOCK), np.float32)
            self._written += len(silence)
            yield silence
        self._written += len(samples)
        yield samples


class _Run:
    """Consecutive frames of one layout without gaps, resampled together."""

    def __init__(self, frame: AudioFrame, start: Fraction) -> None:
        self._layout = _layout(frame)
        self._start = start
        self._read = 0  # source samples
        self._pushed = 0  # source samples of the last frame
        self._returned = 0  # output samples
        self._pending = np.zeros(0, np.float32)  # output samples of the last frame, whose end may be cut
        self._resampler = AudioResampler("flt", "mono", RATE, options=MIX)

    @property
    def at(self) -> int:
        """Index on the timeline of the next output sample."""
        return round(self._start * RATE) + self._returned

    @property
    def end(self) -> Fraction:
        """Seconds after time zero at which the run ends so far."""
        return self._start + Fraction(self._read, self._layout[2])

    def continues(self, frame: AudioFrame, at: Fraction | None) -> bool:
        """Whether a frame at second ``at`` belongs to this run."""
        return _layout(frame) == self._layout and (at is None or abs(at - self.end) <= GAP)

    def push(self, frame: AudioFrame) -> np.ndarray:
        """Resample a frame; returns the output samples of the previous one."""
        frame.pts = None  # samples are counted here
        self._read += frame.samples
        self._pushed = frame.samples
        ready, self._pending = self._pending, _samples(self._resampler.resample(frame))
        return self._count(ready)

    def finish(self, last_samples: int | None = None) -> np.ndarray:
        """Remaining samples, padded or cut to the source's length; only ``last_samples`` of its last frame count."""
        read = self._read if last_samples is None else self._read - self._pushed + last_samples
        tail = np.concatenate([self._pending, _samples(self._resampler.resample(None))])
        missing = max(round(Fraction(read * RATE, self._layout[2])) - self._returned, 0)
        return self._count(np.concatenate([tail[:missing], np.zeros(max(missing - len(tail), 0), np.float32)]))

    def _count(self, samples: np.ndarray) -> np.ndarray:
        self._returned += len(samples)
        return samples


def _layout(frame: AudioFrame) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def _samples(frames: list[AudioFrame]) -> np.ndarray:
    # A resampler with nothing to convert returns its input, including the final None.
    parts = [frame.to_ndarray().reshape(-1) for frame in frames if frame is not None]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)

"""The sound of a stream as one line of 16 kHz mono samples, placed by its timestamps.

Why: models hear 16 kHz mono, and sound and picture must agree; files start their sound late, leave gaps,
overlap and change their layout midway. Sample ``n`` of the line is heard ``n / 16000`` seconds after time
zero.

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

from .container import is_cut_short, open_container, read_only, reason
from .probe import Source

log = logging.getLogger("omnimem.media")

RATE = 16_000  # samples per second of every line
GAP = Fraction(20, 1000)  # seconds; timestamps off by more move the sound, smaller ones are rounding
# Floating point output is not normalised unless told so: two channels would add up to 1.41.
MIX = {"rematrix_maxval": "1.0"}
BLOCK = RATE  # most samples of silence made at once


class AudioTimeline:
    """Blocks of float32 samples, contiguous from time zero.

    Parameters
    ----------
    source : Source
        With an audio stream.
    on_fault : callable
        ``on_fault(seconds_reached, cause)`` is called when reading fails; if it returns, the sound ends
        there. A packet that cannot be decoded is only logged: silence takes its place.
    """

    def __init__(self, source: Source, on_fault: Callable[[Fraction, str], None]) -> None:
        self.source = source
        self.on_fault = on_fault
        self.cut_short = False
        self._written = 0
        self._last_samples: int | None = None  # samples of the final frame that are presented

    def blocks(self) -> Generator[np.ndarray, None, None]:
        """Yield float32 ``[n]``, ``n`` > 0, until the sound ends."""
        run: _Run | None = None
        with open_container(self.source.path) as container:
            stream = container.streams[self.source.info.audio_index or 0]
            assert isinstance(stream, AudioStream)
            read_only(container, stream)
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
            self.cut_short = is_cut_short(container, stream)

    def _time(self, frame: AudioFrame) -> Fraction | None:
        """Seconds after time zero, ``None`` when the file does not say."""
        if frame.pts is None or frame.time_base is None:
            return None
        return frame.pts * frame.time_base - self.source.zero

    def _frames(self, container: InputContainer, stream: AudioStream) -> Iterator[AudioFrame]:
        """Decode every packet; report damaged ones once."""
        damaged = 0
        try:
            for packet in container.demux(stream):
                try:
                    frames = stream.codec_context.decode(packet if packet.size else None)
                except FFmpegError:
                    damaged += 1
                    continue
                if frames and packet.size and packet.duration and stream.time_base == Fraction(1, stream.rate):
                    # MP4 files cut the padding of the last frame by giving its packet a shorter duration.
                    self._last_samples = packet.duration if packet.duration < frames[-1].samples else None
                elif frames:
                    self._last_samples = None
                yield from frames
        except FFmpegError as error:
            self.on_fault(Fraction(self._written, RATE), reason(error))
        if damaged:
            log.warning("%s: %d damaged sound packets; silence in their place", self.source.path.name, damaged)

    def _place(self, at: int, samples: np.ndarray) -> Iterator[np.ndarray]:
        """Put samples at position ``at`` of the line: silence before, overlap cut."""
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
    """Frames of one layout that follow each other without a gap, through one resampler."""

    def __init__(self, frame: AudioFrame, start: Fraction) -> None:
        self._kind = _kind(frame)
        self._start = start
        self._read = 0  # source samples
        self._pushed = 0  # source samples of the last frame
        self._made = 0  # samples given out
        self._waiting = np.zeros(0, np.float32)  # of the last frame: its end may be cut
        self._resampler = AudioResampler("flt", "mono", RATE, options=MIX)

    @property
    def at(self) -> int:
        """Line position of the next samples given out."""
        return round(self._start * RATE) + self._made

    @property
    def end(self) -> Fraction:
        """Seconds after time zero at which the run ends so far."""
        return self._start + Fraction(self._read, self._kind[2])

    def continues(self, frame: AudioFrame, at: Fraction | None) -> bool:
        return _kind(frame) == self._kind and (at is None or abs(at - self.end) <= GAP)

    def push(self, frame: AudioFrame) -> np.ndarray:
        frame.pts = None  # positions are counted here
        self._read += frame.samples
        self._pushed = frame.samples
        ready, self._waiting = self._waiting, _samples(self._resampler.resample(frame))
        return self._give(ready)

    def finish(self, last_samples: int | None = None) -> np.ndarray:
        """The rest: the run becomes as long as its source, of whose last frame ``last_samples`` count."""
        read = self._read if last_samples is None else self._read - self._pushed + last_samples
        rest = np.concatenate([self._waiting, _samples(self._resampler.resample(None))])
        missing = max(round(Fraction(read * RATE, self._kind[2])) - self._made, 0)
        return self._give(np.concatenate([rest[:missing], np.zeros(max(missing - len(rest), 0), np.float32)]))

    def _give(self, samples: np.ndarray) -> np.ndarray:
        self._made += len(samples)
        return samples


def _kind(frame: AudioFrame) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def _samples(frames: list[AudioFrame]) -> np.ndarray:
    # A resampler with nothing to convert hands its input back, the final None included.
    parts = [frame.to_ndarray().reshape(-1) for frame in frames if frame is not None]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)

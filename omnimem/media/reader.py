"""A clip as a sequence of chunks: frames at a fixed rate and 16 kHz mono sound, lazily, in time order.

Why: a streaming model takes a few seconds at a time, and a film does not fit in memory. Picture and sound are
read through a container each, so how a file interleaves them does not matter; both advance chunk by chunk.

    python -c "from omnimem.media import open_media; [print(c) for c in open_media('clip.mp4', fps=2)]"
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Generator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from .audio import RATE, SoundLine
from .chunk import Chunk
from .errors import MediaError
from .probe import MediaInfo, Source, inspect
from .video import TOLERANCE, VideoSampler
from .window import Ahead, SoundWindow, nothing

log = logging.getLogger("omnimem.media")

# A clip is cut off when the header promises so much more than was read; headers round, and some are a little
# long.
MISSING_SECONDS = Fraction(1)
MISSING_SHARE = Fraction(2, 100)


class MediaReader:
    """Iterate over the chunks of one clip; every ``iter()`` opens the file anew.

    Parameters
    ----------
    path : str or PathLike
    fps : float
        Sampling instants per second; ``chunk_seconds * fps`` must be a whole number.
    chunk_seconds : float
    audio, video : bool
        Whether to read sound, and pictures.
    short_side : int, optional
        Scale pictures down (never up) so that the shorter displayed side is at most this; sides become even.
    audio_track : int, optional
        Stream index of the track to hear (``info.audio_tracks``).
    context_seconds : float
        Sound before and after each chunk that is handed out with it.
    max_seconds : float, optional
        The clip ends here; nothing beyond is decoded.
    on_truncated : {"error", "warn"}
        What to do about a file that was cut off: raise once the readable part has been handed out (the chunk
        that the break falls in is not), or end the clip at the last readable instant with a logged warning.

    Attributes
    ----------
    info : MediaInfo

    Raises
    ------
    MediaError
        Here, if the file cannot be opened or holds neither of what was asked for; while iterating, if it is
        cut off. Chunks handed out before stay valid.
    ValueError
        Parameters that make no sense.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fps: float = 1.0,
        chunk_seconds: float = 2.0,
        audio: bool = True,
        video: bool = True,
        short_side: int | None = None,
        audio_track: int | None = None,
        context_seconds: float = 0.1,
        max_seconds: float | None = None,
        on_truncated: Literal["error", "warn"] = "error",
    ) -> None:
        self._fps, self._span = _rational(fps), _rational(chunk_seconds)
        self._context = round(context_seconds * RATE)
        self._limit = None if max_seconds is None else _rational(max_seconds)
        if self._fps <= 0 or self._span <= 0 or self._context < 0 or (self._limit is not None and self._limit <= 0):
            raise ValueError("fps, chunk_seconds and max_seconds must be above 0, context_seconds not below")
        if (self._fps * self._span).denominator != 1:
            raise ValueError(
                f"chunk_seconds * fps must be a whole number of frames, not {chunk_seconds} * {fps} = "
                f"{float(self._fps * self._span):g}; change one of them"
            )
        if short_side is not None and short_side < 2:
            raise ValueError(f"short_side must be at least 2 pixels, not {short_side}")
        if on_truncated not in ("error", "warn"):
            raise ValueError(f"on_truncated must be 'error' or 'warn', not {on_truncated!r}")
        if not (audio or video):
            raise ValueError("audio and video are both off: nothing to read")
        self._on_truncated = on_truncated
        self._source = inspect(Path(path), video=video, audio=audio, audio_track=audio_track, short_side=short_side)

    @property
    def info(self) -> MediaInfo:
        """What is in the file."""
        return self._source.info

    def __iter__(self) -> Generator[Chunk, None, None]:
        clip = _Pass(self._source, self._fps, self._limit, self._context, self._on_truncated == "warn")
        with closing(clip):
            for index in itertools.count():
                chunk = clip.chunk(index, self._span)
                yield chunk
                if chunk.last:
                    return


class _Pass:
    """One run through a clip: its pictures and its sound, in step."""

    def __init__(self, source: Source, fps: Fraction, limit: Fraction | None, context: int, tolerant: bool) -> None:
        self._source = source
        self._fps = fps
        self._limit = limit
        self._tolerant = tolerant
        self._faulty = False
        self._video = self._line = None
        if source.layout is not None:
            self._video = VideoSampler(source, fps, None if limit is None else math.ceil(limit * fps), self._fault)
        if source.info.audio_index is not None:
            self._line = SoundLine(source, self._fault)
        self._pictures = Ahead(self._video.frames() if self._video else nothing())
        sound_end = None if limit is None else round(limit * RATE)
        self._sound = SoundWindow(self._line.blocks() if self._line else nothing(), context, sound_end)

    def close(self) -> None:
        self._pictures.close()
        self._sound.close()

    def chunk(self, index: int, span: Fraction) -> Chunk:
        """Read the next interval; raises MediaError if the clip breaks off within it."""
        t0, t1 = index * span, (index + 1) * span
        if self._limit is not None:
            t1 = min(t1, self._limit)
        instants = range(math.ceil(t0 * self._fps), math.ceil(t1 * self._fps))
        frames = list(itertools.islice(self._pictures, len(instants)))
        before, audio, after = self._sound.take(round(t0 * RATE), round(t1 * RATE))
        goes_on = t1 != self._limit and (self._sound.goes_on or self._pictures.goes_on())
        self._check_break(t1)
        if not goes_on:
            t1 = min(t1, self._end())
        height_width = self._source.layout.shape if self._source.layout else (0, 0, 3)
        return Chunk(
            index=index,
            t0=float(t0),
            t1=float(t1),
            frames=np.stack(frames) if frames else np.zeros((0, *height_width), np.uint8),
            frame_times=np.array([float(i / self._fps) for i in instants[: len(frames)]], np.float64),
            audio=audio if self._line else None,
            audio_before=before,
            audio_after=after,
            last=not goes_on,
        )

    def _check_break(self, t1: Fraction) -> None:
        """Raise (or log) if a cut-off file does not hold all of the interval up to ``t1``."""
        heard = Fraction(self._sound.length, RATE)
        if self._line is not None and self._line.cut_short and heard < t1:
            self._fault(heard, "the file ends early")
        if self._video is not None and self._video.end is not None and self._video.end < t1:
            if self._video.cut_short:
                self._fault(self._video.end, "the file ends early")
            self._pictures.raise_error()

    def _end(self) -> Fraction:
        """Seconds after time zero at which the clip ends; checks it against what the header promises."""
        ends = [Fraction(self._sound.length, RATE)]
        cut_short = self._line is not None and self._line.cut_short
        if self._video is not None:
            if self._video.end is None:  # stopped at max_seconds
                return self._limit or Fraction(0)
            ends.append(self._video.end)
            cut_short = cut_short or self._video.cut_short
        end, promised = max(ends), self._source.promised_end
        if self._limit is None or end + TOLERANCE < self._limit:
            missing = Fraction(0) if promised is None else promised - self._source.zero - end
            if cut_short or missing > max(MISSING_SECONDS, MISSING_SHARE * (end + missing)):
                self._fault(end, "the file ends early")
        return end

    def _fault(self, reached: Fraction, cause: str) -> None:
        """The clip is readable up to ``reached`` seconds only: raise, or log it once."""
        duration = self._source.info.duration
        total = "" if duration is None else f" of {duration:.1f} s"
        what = f"cut off or damaged: readable up to {float(reached):.1f} s{total} ({cause})"
        if not self._tolerant:
            advice = "copy it again, or accept the readable part (omnimem answer --allow-truncated)"
            raise MediaError.about(self._source.path, what, advice)
        if not self._faulty:
            log.warning("%s: %s; the readable part is used", self._source.path.name, what)
        self._faulty = True


open_media = MediaReader
"""Open a clip for reading chunk by chunk: the verb under which other rooms know the class."""


def _rational(value: float) -> Fraction:
    """The fraction meant by a decimal such as 0.3333333 or 29.97002997."""
    return Fraction(value).limit_denominator(100_000)

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
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from .audio import RATE, AudioTimeline
from .chunk import Chunk
from .errors import MediaError
from .lookahead import AudioWindow, FrameLookahead, empty_stream
from .probe import MediaInfo, Source, inspect
from .video import TOLERANCE, VideoSampler

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
    sound : str or PathLike, optional
        Another file, whose sound is heard instead of that of ``path``; each begins at its own first picture or
        sound. Data sets bring the extracted sound of a video as a file beside it.
    fps : float
        Sampling instants per second; ``chunk_seconds * fps`` must be a whole number.
    chunk_seconds : float
    audio, video : bool
        Whether to read sound, and pictures. Without sound the file ``sound`` is not opened.
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
        With ``sound``: the pictures of one file and the sound of the other; ``duration`` is the longer one's.

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
        audio_path: str | os.PathLike[str] | None = None,
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
        # The file of the pictures and that of the sound: the same one, unless the sound lies beside it.
        if audio_path is not None and audio:
            self._sound = inspect(Path(audio_path), video=False, audio_track=audio_track)
            self._source = inspect(Path(path), audio=False, short_side=short_side) if video else self._sound
        else:
            self._source = self._sound = inspect(
                Path(path), video=video, audio=audio, audio_track=audio_track, short_side=short_side
            )

    @property
    def info(self) -> MediaInfo:
        """What is in the file, or in both."""
        if self._sound is self._source:
            return self._source.info
        return _joined(self._source.info, self._sound.info)

    def __iter__(self) -> Generator[Chunk, None, None]:
        tolerant = self._on_truncated == "warn"
        clip = _Pass(self._source, self._sound, self._fps, self._limit, self._context, tolerant)
        with closing(clip):
            for index in itertools.count():
                chunk = clip.chunk(index, self._span)
                yield chunk
                if chunk.last:
                    return


class _Pass:
    """One run through a clip: its pictures and its sound, in step."""

    def __init__(
        self, source: Source, heard: Source, fps: Fraction, limit: Fraction | None, context: int, tolerant: bool
    ) -> None:
        self._source = source
        self._heard = heard
        self._fps = fps
        self._limit = limit
        self._tolerant = tolerant
        self._faulty: set[Path] = set()
        self._video = self._line = None
        if source.layout is not None:
            count = None if limit is None else math.ceil(limit * fps)
            self._video = VideoSampler(source, fps, count, partial(self._fault, source))
        if heard.info.audio_index is not None:
            self._line = AudioTimeline(heard, partial(self._fault, heard))
        self._pictures = FrameLookahead(self._video.frames() if self._video else empty_stream())
        sound_end = None if limit is None else round(limit * RATE)
        self._sound = AudioWindow(self._line.blocks() if self._line else empty_stream(), context, sound_end)

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
        before, audio, after = self._sound.read(round(t0 * RATE), round(t1 * RATE))
        goes_on = t1 != self._limit and (self._sound.has_next or self._pictures.has_next())
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
            self._fault(self._heard, heard, "the file ends early")
        if self._video is not None and self._video.end is not None and self._video.end < t1:
            if self._video.cut_short:
                self._fault(self._source, self._video.end, "the file ends early")
            self._pictures.raise_pending_error()

    def _end(self) -> Fraction:
        """Seconds after time zero at which the clip ends; checks every file against what its header promises."""
        sound_end = Fraction(self._sound.length, RATE)
        sound_cut = self._line is not None and self._line.cut_short
        if self._video is None:
            self._check_end(self._heard, sound_end, sound_cut)
            return sound_end
        if self._video.end is None:  # stopped at max_seconds
            return self._limit or Fraction(0)
        end = max(sound_end, self._video.end)
        if self._heard is self._source:
            self._check_end(self._source, end, sound_cut or self._video.cut_short)
        else:
            self._check_end(self._source, self._video.end, self._video.cut_short)
            self._check_end(self._heard, sound_end, sound_cut)
        return end

    def _check_end(self, source: Source, end: Fraction, cut_short: bool) -> None:
        """Raise (or log) if ``source``, read up to ``end``, should have gone on."""
        if self._limit is None or end + TOLERANCE < self._limit:
            missing = Fraction(0) if source.promised_end is None else source.promised_end - source.zero - end
            if cut_short or missing > max(MISSING_SECONDS, MISSING_SHARE * (end + missing)):
                self._fault(source, end, "the file ends early")

    def _fault(self, source: Source, reached: Fraction, cause: str) -> None:
        """A file is readable up to ``reached`` seconds only: raise, or log it once."""
        duration = source.info.duration
        total = "" if duration is None else f" of {duration:.1f} s"
        what = f"cut off or damaged: readable up to {float(reached):.1f} s{total} ({cause})"
        if not self._tolerant:
            advice = "copy it again, or accept the readable part (omnimem answer --allow-truncated)"
            raise MediaError.about(source.path, what, advice)
        if source.path not in self._faulty:
            log.warning("%s: %s; the readable part is used", source.path.name, what)
        self._faulty.add(source.path)


open_media = MediaReader
"""Open a clip for reading chunk by chunk: the verb under which other rooms know the class."""


def _joined(picture: MediaInfo, sound: MediaInfo) -> MediaInfo:
    """The facts about a clip whose pictures and sound come from a file each."""
    durations = [info.duration for info in (picture, sound) if info.duration is not None]
    return replace(
        picture,
        duration=max(durations) if len(durations) == 2 else None,  # a header that is silent may hide the longer one
        has_audio=sound.has_audio,
        audio_codec=sound.audio_codec,
        audio_index=sound.audio_index,
        audio_tracks=sound.audio_tracks,
        audio_offset=sound.audio_offset,
    )


def _rational(value: float) -> Fraction:
    """The fraction meant by a decimal such as 0.3333333 or 29.97002997."""
    return Fraction(value).limit_denominator(100_000)

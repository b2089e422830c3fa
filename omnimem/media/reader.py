"""Iterate over a clip in chunks: frames at a fixed rate and 16 kHz mono audio, lazily, in time order.

A streaming model needs a few seconds at a time, and a film does not fit in memory. Video and audio are read through
separate containers, so the interleaving in the file does not matter.

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

# A file counts as cut off if its header states more than this beyond the decoded end; headers are often inexact.
MISSING_SECONDS = Fraction(1)
MISSING_SHARE = Fraction(2, 100)


class MediaReader:
    """Iterate over the chunks of one clip; every ``iter()`` opens the file anew.

    Parameters
    ----------
    path : str or PathLike
    audio_path : str or PathLike, optional
        Another file to read the audio from, for data sets with separate audio files; video and audio both start at
        time zero, each with the first frame of its file.
    fps : float
        Sampled frames per second; ``chunk_seconds * fps`` must be a whole number.
    chunk_seconds : float
        Length of a chunk.
    audio, video : bool
        Whether to read audio, video. ``audio_path`` is not opened without audio.
    short_side : int, optional
        Scale frames down (never up) so that the shorter side is at most this; sides become even.
    audio_track : int, optional
        Stream index of the audio track (see ``info.audio_tracks``).
    context_seconds : float
        Seconds of audio before and after each chunk to include in it.
    max_seconds : float, optional
        End of the clip; nothing after it is decoded.
    on_truncated : {"error", "warn"}
        For a file that is cut off or damaged: raise after the last complete chunk, or end the clip at the last
        readable instant and log a warning.

    Attributes
    ----------
    info : MediaInfo
        With ``audio_path``: video of one file and audio of the other; ``duration`` is the longer one.

    Raises
    ------
    MediaError
        On construction, if the file cannot be opened or has neither the requested video nor audio; while iterating,
        if it is cut off or damaged.
    ValueError
        Invalid parameters.
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
            raise ValueError("fps, chunk_seconds and max_seconds must be above 0, and context_seconds at least 0")
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
        if audio_path is not None and audio:
            self._audio_source = inspect(Path(audio_path), video=False, audio_track=audio_track)
            self._source = inspect(Path(path), audio=False, short_side=short_side) if video else self._audio_source
        else:
            self._source = self._audio_source = inspect(
                Path(path), video=video, audio=audio, audio_track=audio_track, short_side=short_side
            )

    @property
    def info(self) -> MediaInfo:
        """Properties of the file, or of both files together."""
        if self._audio_source is self._source:
            return self._source.info
        return _merge_info(self._source.info, self._audio_source.info)

    def __iter__(self) -> Generator[Chunk, None, None]:
        tolerant = self._on_truncated == "warn"
        clip = _ClipReader(self._source, self._audio_source, self._fps, self._limit, self._context, tolerant)
        with closing(clip):
            for index in itertools.count():
                chunk = clip.chunk(index, self._span)
                yield chunk
                if chunk.last:
                    return


class _ClipReader:
    """State of one iteration over a clip."""

    def __init__(
        self, source: Source, audio_source: Source, fps: Fraction, limit: Fraction | None, context: int, tolerant: bool
    ) -> None:
        self._source = source
        self._audio_source = audio_source
        self._fps = fps
        self._limit = limit
        self._tolerant = tolerant
        self._faulty: set[Path] = set()
        self._video = self._timeline = None
        if source.layout is not None:
            count = None if limit is None else math.ceil(limit * fps)
            self._video = VideoSampler(source, fps, count, partial(self._fault, source))
        if audio_source.info.audio_index is not None:
            self._timeline = AudioTimeline(audio_source, partial(self._fault, audio_source))
        self._frames = FrameLookahead(self._video.frames() if self._video else empty_stream())
        audio_end = None if limit is None else round(limit * RATE)
        self._audio = AudioWindow(self._timeline.blocks() if self._timeline else empty_stream(), context, audio_end)

    def close(self) -> None:
        """Close the files."""
        self._frames.close()
        self._audio.close()

    def chunk(self, index: int, span: Fraction) -> Chunk:
        """Read the next interval; raises MediaError if the file is cut off or damaged within it."""
        t0, t1 = index * span, (index + 1) * span
        if self._limit is not None:
            t1 = min(t1, self._limit)
        instants = range(math.ceil(t0 * self._fps), math.ceil(t1 * self._fps))
        frames = list(itertools.islice(self._frames, len(instants)))
        before, audio, after = self._audio.read(round(t0 * RATE), round(t1 * RATE))
        continues = t1 != self._limit and (self._audio.has_next or self._frames.has_next())
        self._check_truncation(t1)
        if not continues:
            t1 = min(t1, self._end())
        height_width = self._source.layout.shape if self._source.layout else (0, 0, 3)
        return Chunk(
            index=index,
            t0=float(t0),
            t1=float(t1),
            frames=np.stack(frames) if frames else np.zeros((0, *height_width), np.uint8),
            frame_times=np.array([float(i / self._fps) for i in instants[: len(frames)]], np.float64),
            audio=audio if self._timeline else None,
            audio_before=before,
            audio_after=after,
            last=not continues,
        )

    def _check_truncation(self, t1: Fraction) -> None:
        """Raise (or log) if a file is truncated before ``t1``; raise a pending decoding error."""
        audio_end = Fraction(self._audio.length, RATE)
        if self._timeline is not None and self._timeline.truncated and audio_end < t1:
            self._fault(self._audio_source, audio_end, "the file ends early")
        if self._video is not None and self._video.end is not None and self._video.end < t1:
            if self._video.truncated:
                self._fault(self._source, self._video.end, "the file ends early")
            self._frames.raise_pending_error()

    def _end(self) -> Fraction:
        """End of the clip in seconds after time zero; checks each file against the duration in its header."""
        audio_end = Fraction(self._audio.length, RATE)
        audio_cut = self._timeline is not None and self._timeline.truncated
        if self._video is None:
            self._check_end(self._audio_source, audio_end, audio_cut)
            return audio_end
        if self._video.end is None:  # stopped at max_seconds
            return self._limit or Fraction(0)
        end = max(audio_end, self._video.end)
        if self._audio_source is self._source:
            self._check_end(self._source, end, audio_cut or self._video.truncated)
        else:
            self._check_end(self._source, self._video.end, self._video.truncated)
            self._check_end(self._audio_source, audio_end, audio_cut)
        return end

    def _check_end(self, source: Source, end: Fraction, truncated: bool) -> None:
        """Raise (or log) if ``source`` ends at ``end``, but its header states a later end."""
        if self._limit is None or end + TOLERANCE < self._limit:
            missing = Fraction(0) if source.header_end is None else source.header_end - source.zero - end
            if truncated or missing > max(MISSING_SECONDS, MISSING_SHARE * (end + missing)):
                self._fault(source, end, "the file ends early")

    def _fault(self, source: Source, reached: Fraction, cause: str) -> None:
        """Raise that a file is readable up to ``reached`` seconds only, or log it once."""
        duration = source.info.duration
        total = "" if duration is None else f" of {duration:.1f} s"
        what = f"cut off or damaged: readable up to {float(reached):.1f} s{total} ({cause})"
        if not self._tolerant:
            advice = "copy it again, or accept the readable part (on_truncated='warn', --allow-truncated)"
            raise MediaError.about(source.path, what, advice)
        if source.path not in self._faulty:
            log.warning("%s: %s; the readable part is used", source.path.name, what)
        self._faulty.add(source.path)


open_media = MediaReader
"""Open a clip for reading chunk by chunk; the same as constructing a `MediaReader`."""


def _merge_info(video: MediaInfo, audio: MediaInfo) -> MediaInfo:
    """Properties of a clip with video and audio from separate files."""
    durations = [info.duration for info in (video, audio) if info.duration is not None]
    return replace(
        video,
        duration=max(durations) if len(durations) == 2 else None,  # if one is unknown, it may be the longer one
        has_audio=audio.has_audio,
        audio_codec=audio.audio_codec,
        audio_index=audio.audio_index,
        audio_tracks=audio.audio_tracks,
        audio_offset=audio.audio_offset,
    )


def _rational(value: float) -> Fraction:
    """Exact fraction for a decimal such as 0.3333333 or 29.97002997."""
    return Fraction(value).limit_denominator(100_000)

"""A prepared clip, read back as the very chunks that its file would give.

python -c "from data_prep.prepared_reader import PreparedReader as R; print(*R('….parquet', short_side=360))"
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.prepared import FRAMES, INT16_SCALE, SOUND, frame_step, rational, read_footer
from omnimem.media import Chunk, MediaError, MediaInfo
from omnimem.media.audio import RATE
from omnimem.media.lookahead import AudioWindow, FrameLookahead, empty_stream


class PreparedReader:
    """Iterate over the chunks of one prepared clip, as `MediaReader` does over those of a file.

    Frames, times, sound and its surroundings are bit for bit those of the original if it was stored exactly. Stored
    with its sound and read without, it keeps the frames that it has with it: other ones than those of the file where
    the picture begins later than the sound. Then, and under a `max_seconds` less than a frame's time behind the end
    of the clip, `t1` of the last chunk may be later by less than that time.

    Parameters
    ----------
    path : path
        The shard.
    name : str, optional
        Of the clip, for errors and `info`; the shard's own when left out.
    fps, chunk_seconds, audio, short_side, context_seconds, max_seconds
        See `MediaReader`. `fps` divides the prepared rate; `short_side` is the prepared one.

    Attributes
    ----------
    info : MediaInfo
        Of the original.

    Raises
    ------
    MediaError
        Here and while iterating: the shard is missing or damaged, or holds neither of what is asked for.
    OmniMemError
        It was prepared in another way than is asked for.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        fps: float = 1.0,
        chunk_seconds: float = 2.0,
        audio: bool = True,
        short_side: int | None = None,
        context_seconds: float = 0.1,
        max_seconds: float | None = None,
    ) -> None:
        self._path, self._name = Path(path), Path(name or path)
        self._fps, self._span = rational(fps), rational(chunk_seconds)
        if (self._fps * self._span).denominator != 1:
            raise ValueError(f"chunk_seconds * fps must be a whole number of frames, not {chunk_seconds} * {fps}")
        self._limit = None if max_seconds is None else rational(max_seconds)
        self._context = round(context_seconds * RATE)
        with self._readable():
            self._settings, self._facts = read_footer(self._path)
        self._step = frame_step(
            self._settings, self._name, fps=fps, short_side=short_side, audio=audio, max_seconds=max_seconds
        )
        self._hears = audio and self._facts.samples is not None
        if not self._hears and self._facts.shape is None:
            raise MediaError.about(self._name, "no picture in it, and sound is off", "leave it out, or let it be heard")
        info = replace(self._facts.info, path=str(self._name))
        if not audio:
            info = replace(info, audio_index=None, audio_codec=None, audio_offset=None)
        self.info: MediaInfo = info

    def __iter__(self) -> Generator[Chunk, None, None]:
        pictures = FrameLookahead(self._frames() if self._facts.shape else empty_stream())
        sound_end = None if self._limit is None else round(self._limit * RATE)
        sound = AudioWindow(self._samples() if self._hears else empty_stream(), self._context, sound_end)
        try:
            for index in itertools.count():
                chunk = self._chunk(index, pictures, sound)
                yield chunk
                if chunk.last:
                    return
        finally:
            pictures.close()
            sound.close()

    def _chunk(self, index: int, pictures: FrameLookahead, sound: AudioWindow) -> Chunk:
        t0, t1 = index * self._span, (index + 1) * self._span
        if self._limit is not None:
            t1 = min(t1, self._limit)
        instants = range(math.ceil(t0 * self._fps), math.ceil(t1 * self._fps))
        frames = list(itertools.islice(pictures, len(instants)))
        before, audio, after = sound.read(round(t0 * RATE), round(t1 * RATE))
        goes_on = t1 != self._limit and (sound.has_next or pictures.has_next())
        if not goes_on:
            t1 = min(t1, self._end())
        return Chunk(
            index=index,
            t0=float(t0),
            t1=float(t1),
            frames=np.stack(frames) if frames else np.zeros((0, *(self._facts.shape or (0, 0)), 3), np.uint8),
            frame_times=np.array([float(i / self._fps) for i in instants[: len(frames)]], np.float64),
            audio=audio if self._hears else None,
            audio_before=before,
            audio_after=after,
            last=not goes_on,
        )

    @property
    def _instants(self) -> int:
        """Frames there are at the rate that is read."""
        return -(-self._facts.instants // self._step)

    def _end(self) -> Fraction:
        """Second at which the clip ends, if it is not cut before."""
        end = Fraction(self._facts.end)
        if self._facts.shape is not None:
            # A file is not read beyond the last frame wanted, so nobody knows whether it ends just behind it.
            if self._limit is not None and self._instants >= math.ceil(self._limit * self._fps):
                return end if self._settings.max_seconds == float(self._limit) else self._limit
            # Of two that end together with the sound, the picture may have ended before.
            if not self._hears and self._facts.samples is not None and Fraction(self._facts.samples, RATE) >= end:
                return min(end, self._instants / self._fps)
        return end

    def _frames(self) -> Generator[np.ndarray, None, None]:
        from PIL import Image

        wanted = self._instants if self._limit is None else math.ceil(self._limit * self._fps)
        number = 0
        for group in self._groups(FRAMES):
            for picture in itertools.chain.from_iterable(group.to_pylist()):
                if number >= wanted * self._step:
                    return
                if number % self._step == 0:
                    with self._readable(), Image.open(io.BytesIO(picture["bytes"])) as image:
                        pixels = np.asarray(image.convert("RGB"))
                    yield pixels
                number += 1

    def _samples(self) -> Generator[np.ndarray, None, None]:
        for group in self._groups(SOUND):
            samples = group.combine_chunks().flatten().to_numpy(zero_copy_only=False)
            if samples.dtype == np.int16:
                samples = samples.astype(np.float32) / INT16_SCALE
            if len(samples):
                yield samples

    def _groups(self, column: str) -> Generator[Any, None, None]:
        """One column, some seconds at a time."""
        from pyarrow.parquet import ParquetFile

        with self._readable():
            file = ParquetFile(self._path, page_checksum_verification=True)
        with file:
            for number in range(file.num_row_groups):
                with self._readable():
                    group = file.read_row_group(number, columns=[column], use_threads=False).column(column)
                yield group

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Say in one line that a shard is damaged."""
        try:
            yield
        except FileNotFoundError:
            raise MediaError.about(self._name, f"its shard {self._path} is missing", "prepare it again") from None
        except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:  # pyarrow and Pillow raise all of them
            cause = f"its shard {self._path} is damaged ({' '.join(str(error).split())[:120]})"
            raise MediaError.about(self._name, cause, "delete the shard and prepare it again") from error

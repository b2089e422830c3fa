"""Read a shard as the same chunks that `MediaReader` gives for the original file.

python -c "from data_prep.decoded_clips.shard_reader import ShardReader as R; print(*R('….parquet', short_side=360))"
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

from data_prep.decoded_clips.format import AUDIO, FRAMES, INT16_SCALE, frame_stride, rational, read_footer
from omnimem.media import Chunk, MediaError, MediaInfo
from omnimem.media.audio import RATE
from omnimem.media.lookahead import AudioWindow, FrameLookahead, empty_stream


class ShardReader:
    """Iterate over the chunks of a shard, as `MediaReader` does over those of a file.

    Frames, frame times and audio equal those of the original file bit for bit if the shard was stored exactly
    (`PrepareSettings.exact`), with two exceptions. A clip stored with audio and read without audio has the frames it
    was stored with; `MediaReader` chooses other frames where video starts later than audio. In that case, and when
    `max_seconds` exceeds the length of the clip by less than one frame period, `t1` of the last chunk may be up to one
    frame period later.

    Parameters
    ----------
    path : path
        The shard.
    name : str, optional
        Name of the clip in errors and `info`. Default: the shard's path.
    fps, chunk_seconds, audio, short_side, context_seconds, max_seconds
        See `MediaReader`. `fps` must divide the stored rate; `short_side` must be the stored one.

    Attributes
    ----------
    info : MediaInfo
        Of the original file.

    Raises
    ------
    MediaError
        Here and while iterating: the shard is missing or damaged, or it has neither video nor the requested audio.
    OmniMemError
        The shard was stored with settings that do not allow the requested ones.
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
            self._settings, self._metadata = read_footer(self._path)
        self._stride = frame_stride(
            self._settings, self._name, fps=fps, short_side=short_side, audio=audio, max_seconds=max_seconds
        )
        self._has_audio = audio and self._metadata.num_samples is not None
        if not self._has_audio and self._metadata.frame_size is None:
            raise MediaError.about(self._name, "no video, and audio is off", "remove the row, or turn audio on")
        info = replace(self._metadata.info, path=str(self._name))
        if not audio:
            info = replace(info, audio_index=None, audio_codec=None, audio_offset=None)
        self.info: MediaInfo = info

    def __iter__(self) -> Generator[Chunk, None, None]:
        frames = FrameLookahead(self._frames() if self._metadata.frame_size else empty_stream())
        audio_end = None if self._limit is None else round(self._limit * RATE)
        audio = AudioWindow(self._samples() if self._has_audio else empty_stream(), self._context, audio_end)
        try:
            for index in itertools.count():
                chunk = self._chunk(index, frames, audio)
                yield chunk
                if chunk.last:
                    return
        finally:
            frames.close()
            audio.close()

    def _chunk(self, index: int, ahead: FrameLookahead, window: AudioWindow) -> Chunk:
        t0, t1 = index * self._span, (index + 1) * self._span
        if self._limit is not None:
            t1 = min(t1, self._limit)
        instants = range(math.ceil(t0 * self._fps), math.ceil(t1 * self._fps))
        frames = list(itertools.islice(ahead, len(instants)))
        before, audio, after = window.read(round(t0 * RATE), round(t1 * RATE))
        last = t1 == self._limit or not (window.has_next or ahead.has_next())
        if last:
            t1 = min(t1, self._end())
        return Chunk(
            index=index,
            t0=float(t0),
            t1=float(t1),
            frames=np.stack(frames) if frames else np.zeros((0, *(self._metadata.frame_size or (0, 0)), 3), np.uint8),
            frame_times=np.array([float(i / self._fps) for i in instants[: len(frames)]], np.float64),
            audio=audio if self._has_audio else None,
            audio_before=before,
            audio_after=after,
            last=last,
        )

    @property
    def _num_frames(self) -> int:
        """Frames of the clip at the requested rate."""
        return -(-self._metadata.num_frames // self._stride)

    def _end(self) -> Fraction:
        """Second at which the clip ends, unless `max_seconds` ends it earlier."""
        end = Fraction(self._metadata.end)
        if self._metadata.frame_size is not None:
            # As `MediaReader`, which does not read beyond the last requested frame and so does not know whether the
            # clip ends right after it.
            if self._limit is not None and self._num_frames >= math.ceil(self._limit * self._fps):
                return end if self._settings.max_seconds == float(self._limit) else self._limit
            # The clip ends with its audio; its video may have ended earlier.
            if (
                not self._has_audio
                and self._metadata.num_samples is not None
                and Fraction(self._metadata.num_samples, RATE) >= end
            ):
                return min(end, self._num_frames / self._fps)
        return end

    def _frames(self) -> Generator[np.ndarray, None, None]:
        from PIL import Image

        wanted = self._num_frames if self._limit is None else math.ceil(self._limit * self._fps)
        number = 0
        for group in self._groups(FRAMES):
            for image_file in itertools.chain.from_iterable(group.to_pylist()):
                if number >= wanted * self._stride:
                    return
                if number % self._stride == 0:
                    with self._readable(), Image.open(io.BytesIO(image_file["bytes"])) as image:
                        pixels = np.asarray(image.convert("RGB"))
                    yield pixels
                number += 1

    def _samples(self) -> Generator[np.ndarray, None, None]:
        for group in self._groups(AUDIO):
            samples = group.combine_chunks().flatten().to_numpy(zero_copy_only=False)
            if samples.dtype == np.int16:
                samples = samples.astype(np.float32) / INT16_SCALE
            if len(samples):
                yield samples

    def _groups(self, column: str) -> Generator[Any, None, None]:
        """One column, one row group at a time."""
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
        """Report a missing or damaged shard in one line."""
        try:
            yield
        except FileNotFoundError:
            raise MediaError.about(self._name, f"its shard {self._path} is missing", "prepare it again") from None
        except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:  # pyarrow and Pillow raise all of them
            cause = f"its shard {self._path} is damaged ({' '.join(str(error).split())[:120]})"
            raise MediaError.about(self._name, cause, "delete the shard and prepare it again") from error

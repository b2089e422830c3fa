"""Bounded lookahead: whether another frame follows, and the audio around an interval.

A chunk knows whether it is the last one and includes some neighbouring audio; nothing more is buffered.

    python -m pytest tests/media/test_media.py -k context
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np

from .errors import MediaError


class FrameLookahead:
    """Iterator over frames that can tell whether another frame follows.

    An error of the lookahead is raised when the frame is requested, so all earlier frames remain usable.
    """

    def __init__(self, frames: Generator[np.ndarray, None, None]) -> None:
        self._frames = frames
        self._next: list[np.ndarray] = []
        self._error: MediaError | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        self.raise_pending_error()
        return self._next.pop() if self._next else next(self._frames)

    def has_next(self) -> bool:
        """Whether ``next`` returns a frame or raises a MediaError."""
        if not self._next and self._error is None:
            try:
                self._next = [frame for frame in [next(self._frames, None)] if frame is not None]
            except MediaError as error:
                self._error = error
        return bool(self._next) or self._error is not None

    def raise_pending_error(self) -> None:
        """Raise the error of the lookahead, if any."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Close the file of the frames."""
        self._next.clear()
        self._frames.close()


class AudioWindow:
    """Cut consecutive blocks of audio into intervals, with ``context`` samples before and after each.

    Parameters
    ----------
    blocks : generator of np.ndarray
        float32 ``[n]``, contiguous.
    context : int
        Number of samples.
    end : int or None
        Number of samples after which the audio is cut.
    """

    def __init__(self, blocks: Generator[np.ndarray, None, None], context: int, end: int | None) -> None:
        self._blocks = blocks
        self._context = context
        self._end = end
        self._held = np.zeros(0, np.float32)
        self._from = 0  # index of the first held sample
        self._stop = 0  # end of the last interval read

    @property
    def length(self) -> int:
        """Number of samples decoded so far; the total once the audio has ended."""
        return self._from + len(self._held)

    @property
    def has_next(self) -> bool:
        """Whether there is audio after the last interval read."""
        return self.length > self._stop

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples before, in and after ``[start, stop)``; intervals must be read in order."""
        self._fill(stop + max(self._context, 1))
        at = start - self._from
        before = self._held[max(at - self._context, 0) : max(at, 0)].copy()
        inside = self._held[at : stop - self._from].copy()
        after = self._held[stop - self._from : stop - self._from + self._context].copy()
        drop = min(max(stop - self._context - self._from, 0), len(self._held))
        self._held, self._from, self._stop = self._held[drop:].copy(), self._from + drop, stop
        return before, inside, after

    def close(self) -> None:
        """Close the file of the audio."""
        self._blocks.close()

    def _fill(self, until: int) -> None:
        """Decode blocks up to sample ``until``, if there are as many."""
        wanted = until if self._end is None else min(until, self._end)
        parts = [self._held]
        length = self.length
        while length < wanted:
            block = next(self._blocks, None)
            if block is None:
                break
            parts.append(block)
            length += len(block)
        self._held = np.concatenate(parts)
        if self._end is not None:
            self._held = self._held[: self._end - self._from]


def empty_stream() -> Generator[np.ndarray, None, None]:
    """Frames or audio of a clip that has none."""
    yield from ()

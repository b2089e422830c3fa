"""Looking a little ahead: whether a picture follows, and the sound around an interval.

Why: a chunk says whether it is the last and carries the sound next to it, without holding more than that.

    python -m pytest tests/media/test_media.py -k context
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np

from .errors import MediaError


class FrameLookahead:
    """An iterator over pictures that can tell whether another follows.

    An error met while looking ahead is raised when the picture is asked for, so that what came before it
    stays usable.
    """

    def __init__(self, pictures: Generator[np.ndarray, None, None]) -> None:
        self._pictures = pictures
        self._next: list[np.ndarray] = []
        self._error: MediaError | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        self.raise_pending_error()
        return self._next.pop() if self._next else next(self._pictures)

    def has_next(self) -> bool:
        """Whether asking for a picture gives one, or an error."""
        if not self._next and self._error is None:
            try:
                self._next = [picture for picture in [next(self._pictures, None)] if picture is not None]
            except MediaError as error:
                self._error = error
        return bool(self._next) or self._error is not None

    def raise_pending_error(self) -> None:
        """Raise now what looking ahead met."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Close the file that the pictures come from."""
        self._next.clear()
        self._pictures.close()


class AudioWindow:
    """Cut a line of sound into intervals, with ``context`` samples of what is next to them.

    Parameters
    ----------
    blocks : generator of np.ndarray
        float32 ``[n]``, contiguous.
    context : int
        Samples.
    end : int or None
        Sample at which the line is cut.
    """

    def __init__(self, blocks: Generator[np.ndarray, None, None], context: int, end: int | None) -> None:
        self._blocks = blocks
        self._context = context
        self._end = end
        self._held = np.zeros(0, np.float32)
        self._from = 0  # position of the first held sample
        self._stop = 0  # end of the last interval taken

    @property
    def length(self) -> int:
        """Samples read so far; all of them once the sound has ended."""
        return self._from + len(self._held)

    @property
    def has_next(self) -> bool:
        """Whether there is sound after the last interval taken."""
        return self.length > self._stop

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples before, in and after ``[start, stop)``; intervals are taken in order."""
        self._fill(stop + max(self._context, 1))
        at = start - self._from
        before = self._held[max(at - self._context, 0) : max(at, 0)].copy()
        inside = self._held[at : stop - self._from].copy()
        after = self._held[stop - self._from : stop - self._from + self._context].copy()
        drop = min(max(stop - self._context - self._from, 0), len(self._held))
        self._held, self._from, self._stop = self._held[drop:].copy(), self._from + drop, stop
        return before, inside, after

    def close(self) -> None:
        """Close the file that the sound comes from."""
        self._blocks.close()

    def _fill(self, until: int) -> None:
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
    """The pictures, or the sound, of a clip that has none."""
    yield from ()

"""Choose the frame of each sampling instant from packet timestamps, before decoding.

At 1 fps, 29 of 30 frames of a 30 fps video are not wanted, and many of those need not be decoded. The frame of an
instant is the last one presented at or before it. Decoding times increase and never exceed the presentation time of
their packet, so the frame of an instant is known ("settled") once a packet's decoding time is later than the instant.

    python -m pytest tests/media/test_media.py -k plan
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable


class PlanImpossible(Exception):
    """The timestamps do not allow choosing frames before decoding them; the message says why."""


class FramePlan:
    """Assign sampling instants to presentation times as packets arrive in decoding order.

    Parameters
    ----------
    limit : callable
        ``limit(i)``: latest presentation time (ticks) of a frame shown at instant ``i``; increases with ``i``.
    first_pts : int
        Presentation time of the first frame; earlier packets (not decodable, or edited out) are never chosen.
    count : int or None
        Number of instants; None: until the end of the stream.
    """

    def __init__(self, limit: Callable[[int], int], first_pts: int, count: int | None) -> None:
        self.limit = limit
        self.first_pts = first_pts
        self.count = count
        self.settled = 0  # instants assigned so far
        self.wanted: deque[tuple[int, int]] = deque()  # (pts, number of instants that show it), increasing
        self._wanted_pts: set[int] = set()
        self._next_limit = limit(0)
        self._shown: list[int] = []  # pts that unsettled instants may show, sorted
        self._watermark: int | None = None

    @property
    def done(self) -> bool:
        """Whether all instants are settled."""
        return self.count is not None and self.settled >= self.count

    def add(self, pts: int | None, dts: int | None, shown: bool) -> None:
        """Add the timestamps of the next packet; ``shown``: whether its frame is presented."""
        if pts is None:
            raise PlanImpossible("a packet without presentation time")
        if shown and pts >= self.first_pts:
            at = bisect_left(self._shown, pts)
            if self._shown[at : at + 1] == [pts]:
                raise PlanImpossible("two frames with the same presentation time")
            insort(self._shown, pts)
        if dts is None:
            return
        if dts > pts or (self._watermark is not None and dts < self._watermark):
            raise PlanImpossible("decoding times out of order")
        self._watermark = dts
        while not self.done and self._next_limit < dts:
            self._settle()
        del self._shown[: self._next_shown()]

    def finish(self, instants: int) -> None:
        """After the last packet: settle all remaining instants below ``instants``."""
        while not self.done and self.settled < instants and self._shown:
            self._settle()

    def passed(self, pts: int) -> bool:
        """Whether a decoding time later than ``pts`` was seen."""
        return self._watermark is not None and self._watermark > pts

    def is_wanted(self, pts: int | None) -> bool:
        """Whether a settled instant shows this frame."""
        return pts in self._wanted_pts

    def is_open(self, pts: int) -> bool:
        """Whether an unsettled instant may show this frame."""
        at = self._next_shown()
        return not self.done and (at == len(self._shown) or pts >= self._shown[at])

    def pop_wanted(self) -> int:
        """Remove the next wanted frame; returns the number of instants that show it."""
        pts, instants = self.wanted.popleft()
        self._wanted_pts.discard(pts)
        return instants

    def _next_shown(self) -> int:
        """Index in ``_shown`` of the frame of the next instant, as far as known."""
        return max(bisect_right(self._shown, self._next_limit) - 1, 0)

    def _settle(self) -> None:
        at = bisect_right(self._shown, self._next_limit) - 1
        pts = self._shown[at] if at >= 0 else self.first_pts
        if self.wanted and self.wanted[-1][0] == pts:
            self.wanted[-1] = (pts, self.wanted[-1][1] + 1)
        else:
            self.wanted.append((pts, 1))
            self._wanted_pts.add(pts)
        self.settled += 1
        self._next_limit = self.limit(self.settled)

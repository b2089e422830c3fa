"""Which frame each sampling instant shows, from packet timestamps alone.

Why: at 1 frame a second, 29 of 30 pictures need not be decoded; packets say when each picture is shown before
it is. The frame of an instant is the last one whose time is not after it, so an instant is settled once no
packet to come can be shown at or before it: when a decoding time (which only grows, and which no display time
precedes) has passed it.

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
        ``limit(i)``: the latest presentation time (ticks) that counts as shown at instant ``i``; grows with
        ``i``.
    first_pts : int
        Of the first presented frame; earlier packets (not decodable, or edited out) are never chosen.
    count : int or None
        Number of instants wanted; ``None`` for as many as the stream holds.
    """

    def __init__(self, limit: Callable[[int], int], first_pts: int, count: int | None) -> None:
        self.limit = limit
        self.first_pts = first_pts
        self.count = count
        self.settled = 0  # instants assigned so far
        self.wanted: deque[tuple[int, int]] = deque()  # (pts, how many instants show it), growing
        self._wanted_pts: set[int] = set()
        self._next_limit = limit(0)
        self._shown: list[int] = []  # pts that instants still to settle may show, sorted
        self._watermark: int | None = None

    @property
    def done(self) -> bool:
        """Every wanted instant is settled."""
        return self.count is not None and self.settled >= self.count

    def add(self, pts: int | None, dts: int | None, shown: bool) -> None:
        """Take the next packet's times; ``shown`` is false for one whose picture is not presented."""
        if pts is None:
            raise PlanImpossible("a packet without presentation time")
        if shown and pts >= self.first_pts:
            at = bisect_left(self._shown, pts)
            if self._shown[at : at + 1] == [pts]:
                raise PlanImpossible("two pictures with the same presentation time")
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
        """No packet follows: settle every remaining instant below ``instants``."""
        while not self.done and self.settled < instants and self._shown:
            self._settle()

    def passed(self, pts: int) -> bool:
        """Whether the decoding times have gone beyond ``pts``."""
        return self._watermark is not None and self._watermark > pts

    def is_wanted(self, pts: int | None) -> bool:
        """Whether a settled instant shows this picture."""
        return pts in self._wanted_pts

    def is_open(self, pts: int) -> bool:
        """Whether an instant still to settle may show this picture."""
        at = self._next_shown()
        return not self.done and (at == len(self._shown) or pts >= self._shown[at])

    def pop_wanted(self) -> int:
        """Remove the next wanted picture and return how many instants show it."""
        pts, instants = self.wanted.popleft()
        self._wanted_pts.discard(pts)
        return instants

    def _next_shown(self) -> int:
        """Index in ``_shown`` of the picture that the next instant shows, as far as is known."""
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

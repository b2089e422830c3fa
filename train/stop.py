"""Stop a run on request: SIGINT (Ctrl-C) and a scheduler's SIGTERM end it after the current step, which is saved."""

from __future__ import annotations

import logging
import signal
from typing import Any

log = logging.getLogger("omnimem.train")

AT_ONCE: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""What each signal does when it arrives a second time."""


class StopRequest:
    """Handlers of SIGINT and SIGTERM that ask for a stop after the current step; a second signal ends the run at once.

    They are installed whatever the signals did before: a shell starts background jobs with SIGINT ignored. SIGHUP is
    left as it is, ignored under ``nohup``.

    Attributes
    ----------
    requested : bool
        Whether a signal has arrived.
    """

    def __enter__(self) -> StopRequest:
        self.requested = False
        self._before = {number: signal.signal(number, self._note) for number in AT_ONCE}
        return self

    def _note(self, _number: int, _frame: Any) -> None:
        self.requested = True
        log.warning("stopping after this step (again to stop at once)")
        for number, handler in AT_ONCE.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

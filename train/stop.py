"""Stop a run on a signal: after SIGINT (Ctrl-C) or SIGTERM it ends after the current step, which is saved."""

from __future__ import annotations

import logging
import signal
from typing import Any

log = logging.getLogger("omnimem.train")

SECOND_SIGNAL: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""Handler of each signal after it has arrived once."""


class StopRequest:
    """Handles SIGINT and SIGTERM: the first signal stops the run after the current step, the second one at once.

    The handlers replace any earlier ones, because a shell starts background jobs with SIGINT ignored. SIGHUP is not
    handled, so that ``nohup`` works.

    Attributes
    ----------
    requested : bool
        Whether a signal has arrived.
    """

    def __enter__(self) -> StopRequest:
        self.requested = False
        self._previous = {number: signal.signal(number, self._request) for number in SECOND_SIGNAL}
        return self

    def _request(self, _number: int, _frame: Any) -> None:
        self.requested = True
        log.warning("stopping after this step (a second signal stops at once)")
        for number, handler in SECOND_SIGNAL.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

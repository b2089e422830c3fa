"""Stopping on request: Ctrl-C and a scheduler's SIGTERM end a run after the step under way, which is then saved."""

from __future__ import annotations

import logging
import signal
from typing import Any

log = logging.getLogger("omnimem.train")


class StopRequest:
    """Ctrl-C or a scheduler's SIGTERM asks for a stop after the step under way; a second one does not wait."""

    def __enter__(self) -> StopRequest:
        self.requested = False
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, _number: int, _frame: Any) -> None:
        self.requested = True
        log.warning("stopping after this step (again to stop at once)")
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

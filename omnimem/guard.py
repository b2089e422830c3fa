"""Run a command and turn its exceptions into one line on stderr and an exit status."""

from __future__ import annotations

import errno
import os
import select
import sys
import traceback
from collections.abc import Callable

from omnimem.errors import OmniMemError


def run_guarded(program: str, work: Callable[[], object], debug: bool = False, quiet: bool = False) -> int:
    """Call `work` and turn what it raises into one line on stderr and an exit status.

    Parameters
    ----------
    program : str
        Opens the line.
    work : callable
        The command.
    debug : bool
        Show the traceback as well.
    quiet : bool
        Leave an `OmniMemError` to another process, which prints the same one.

    Returns
    -------
    int
        0 done, 2 for `OmniMemError` and for a file name that is too long, 1 for an interruption or any other exception.
    """
    try:
        work()
        sys.stdout.flush()  # here and not at exit, where a closed pipe could no longer be caught
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            # What is still buffered must not raise once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if debug:
            traceback.print_exc()
        line, status = f"internal error: {type(error).__name__}: {error}", 1
        if isinstance(error, KeyboardInterrupt):
            line = "interrupted"
        elif isinstance(error, OmniMemError):
            line, status = str(error), 2
        elif isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            line, status = f"{error.filename}: {error.strerror}", 2
        elif not debug:
            line += " (run with --debug for the traceback)"
    if not (quiet and status == 2):
        text = f"{program}: {' '.join(line.split())}"
        print(text.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    return status


def _reader_has_left() -> bool:
    """Say whether it is our own stdout that is closed at the other end (`| head`), not some worker's pipe."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # a closed pipe is reported without being asked for
    return bool(poll.poll(0))

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
    """Call `work`; print an exception as one line on stderr and return an exit status.

    Parameters
    ----------
    program : str
        Start of the line.
    work : callable
        The command.
    debug : bool
        Show the traceback as well.
    quiet : bool
        Do not print an `OmniMemError`: another process prints the same one.

    Returns
    -------
    int
        0 without an exception, 2 for `OmniMemError` or a file name that is too long, 1 for any other exception.
    """
    try:
        work()
        sys.stdout.flush()  # not at exit, where a closed pipe cannot be caught
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            # Buffered output must not raise again at exit.
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


def _stdout_is_closed() -> bool:
    """Whether the reader of stdout has closed its pipe (`| head`), rather than that of a worker process."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # a closed pipe is always reported
    return bool(poll.poll(0))

"""Process files in worker processes and continue when one of the workers dies.

A decoder that crashes or exhausts memory kills its process, and Python then discards the whole pool. The files that
were in progress are processed again, one at a time: the file whose process dies a second time is the cause.

    for item, result in in_processes(check_file, files, workers=4): ...
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import Connection
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

TASKS_PER_WORKER = 2  # one running and one queued; a small number, because they are repeated after a crash


def processors() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[tuple[Item, Result | None], None, None]:
    """Call `function` on every item in worker processes; yield each result when it completes, None if its process died.

    Parameters
    ----------
    function : callable
        A module-level function, because workers are spawned and import it. Its exceptions are raised here.
    items : iterable
        Picklable items, consumed as workers become free.
    workers : int
        Number of processes.
    """
    remaining = iter(items)
    while suspects := (yield from _run_until_a_worker_dies(function, remaining, workers)):
        for item in suspects:
            if (yield from _run_until_a_worker_dies(function, iter([item]), 1)):
                yield item, None


def _run_until_a_worker_dies(
    function: Callable[[Item], Result], remaining: Iterator[Item], workers: int
) -> Generator[tuple[Item, Result], None, list[Item]]:
    """Yield results until all items are done; return the items in progress if a worker died."""
    first = list(islice(remaining, 1))
    if not first:
        return []
    context = multiprocessing.get_context("spawn")
    # The system closes the pipe when this process ends in any way; the workers then exit.
    worker_end, parent_end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_exit_with_parent, initargs=(worker_end,))
    running: dict[Future[Result], Item] = {}
    try:
        while True:
            for item in [*first, *islice(remaining, TASKS_PER_WORKER * workers - len(running) - len(first))]:
                try:
                    running[pool.submit(function, item)] = item
                except BrokenProcessPool:
                    return [*running.values(), item]
            first = []
            if not running:
                return []
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                if not isinstance(future.exception(), BrokenProcessPool):
                    yield running.pop(future), future.result()
            if any(future in running for future in done):
                return list(running.values())
    finally:
        if running:
            parent_end.close()
        pool.shutdown(cancel_futures=True)
        parent_end.close()
        worker_end.close()


def _exit_with_parent(worker_end: Connection) -> None:
    """End this worker as soon as the other end of the pipe is closed, even while it decodes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent closes the pipe

    def watch() -> None:
        worker_end.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

"""Many files read by worker processes, and going on when one of them dies.

A decoder that crashes, or that takes all memory, takes its process along, and with it Python's whole pool. Whatever was
at work then is done again, each file alone: the one whose process dies again is the one.

    python -m pytest tests/data_prep/test_validate.py -k "crash or interrupted"
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

AHEAD = 2  # files handed to each worker before it asks: it need not wait, and few are read twice


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[tuple[Item, Result | None], None, None]:
    """Call `function` on every item in worker processes; yield results as they come, None where the process died.

    Parameters
    ----------
    function : callable
        Of a module (workers are spawned and import it). What it raises ends the work.
    items : iterable
        Taken as workers ask for them; picklable.
    workers : int
    """
    waiting = iter(items)
    while suspects := (yield from _until_one_dies(function, waiting, workers)):
        for item in suspects:
            if (yield from _until_one_dies(function, iter([item]), 1)):
                yield item, None


def _until_one_dies(
    function: Callable[[Item], Result], waiting: Iterator[Item], workers: int
) -> Generator[tuple[Item, Result], None, list[Item]]:
    """Yield results until all are done; return the items in flight if a worker died."""
    first = list(islice(waiting, 1))
    if not first:
        return []
    context = multiprocessing.get_context("spawn")
    # Closed when this process ends, however it ends: workers that decode do not outlive it.
    lifeline, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with, initargs=(lifeline,))
    running: dict[Future[Result], Item] = {}
    try:
        while True:
            for item in [*first, *islice(waiting, AHEAD * workers - len(running) - len(first))]:
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
            held.close()
        pool.shutdown(cancel_futures=True)
        held.close()
        lifeline.close()


def _die_with(lifeline: Connection) -> None:
    """End this worker as soon as the other end of `lifeline` is closed, in the middle of a file if need be."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent closes the lifeline

    def watch() -> None:
        lifeline.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

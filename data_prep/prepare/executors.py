"""Where the clips are prepared: in processes of this machine, or on a Ray cluster. Both call the same function.

omnimem data prepare train.jsonl --to prepared --workers 16
omnimem data prepare train.jsonl --to prepared --executor ray
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from itertools import islice
from typing import Any, TypeVar

from omnimem.errors import OmniMemError

Item = TypeVar("Item")
Result = TypeVar("Result")

WAITING = 2
"""Tasks handed out for each worker: one at work, one so that it need not wait."""

log = logging.getLogger("omnimem.data")


def default_workers() -> int:
    """CPU cores of this machine."""
    return os.cpu_count() or 1


def in_processes(
    function: Callable[[Item], Result], tasks: Iterable[Item], workers: int | None = None
) -> Generator[Result, None, None]:
    """Results of a function of this package, as they come; of one worker in this process itself.

    Raises
    ------
    OmniMemError
        A worker was killed.
    """
    workers = default_workers() if workers is None else workers
    if workers == 1:
        yield from map(function, tasks)
        return
    others = set(multiprocessing.active_children())
    # Not forked: threads of this process (a progress bar, an allocator) would leave their locks behind.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=signal.signal, initargs=_NO_INTERRUPTS)
    try:
        remaining = iter(tasks)
        waiting: set[Future[Result]] = {pool.submit(function, task) for task in islice(remaining, WAITING * workers)}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            waiting |= {pool.submit(function, task) for task in islice(remaining, len(done))}
            for future in done:
                yield future.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise OmniMemError(
            "a worker was killed, perhaps for want of memory: lower --workers; what is prepared stays"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()  # an interruption does not wait for the clips at work


_NO_INTERRUPTS = (signal.SIGINT, signal.SIG_IGN)
"""Ctrl-C reaches every process of a terminal; the one that asked for the work ends the others."""


def on_ray(
    function: Callable[[Item], Result], tasks: Iterable[Item], workers: int | None = None
) -> Generator[Result, None, None]:
    """The same on the Ray cluster there is, else on one started here; paths must mean the same on all its machines.

    Raises
    ------
    OmniMemError
        Ray is not installed, the cluster of ``RAY_ADDRESS`` does not answer, or a worker died.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise OmniMemError("--executor ray needs Ray: pip install 'omnimem[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        _join(ray, workers)
    waiting: list[Any] = []
    try:
        remote = ray.remote(function)
        count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        remaining = iter(tasks)
        waiting = [remote.remote(task) for task in islice(remaining, WAITING * count)]
        while waiting:
            done, waiting = ray.wait(waiting)
            waiting += [remote.remote(task) for task in islice(remaining, len(done))]
            yield from ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise OmniMemError(f"Ray: {str(error).splitlines()[0]}; what is prepared stays") from error
    finally:
        for left in waiting:
            ray.cancel(left, force=True)
        if ours:
            ray.shutdown()


def _join(ray: Any, workers: int | None) -> None:
    """Connect to the cluster of ``RAY_ADDRESS`` or of this machine; where there is none, start a local one."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address is not None:
            _knock(address)
        ray.init(address="auto", **quiet)
        log.info("on the Ray cluster at %s", address or "this machine")
    except ConnectionError as error:
        if address is not None:
            raise OmniMemError(f"no Ray cluster answers at RAY_ADDRESS={address}; start it or unset it") from error
        log.info("no Ray cluster found: a local one is started")
        ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)


def _knock(address: str) -> None:
    """Find out in seconds that nobody is there; Ray itself goes on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(address) from error


EXECUTORS = {"process": in_processes, "ray": on_ray}

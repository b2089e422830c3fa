"""Where the clips are decoded: in processes of this machine, or on a Ray cluster. Both call the same function.

omnimem data prepare train.jsonl --to prepared --workers 16
omnimem data prepare train.jsonl --to prepared --executor ray
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Generator, Iterable
from importlib import import_module
from itertools import islice
from typing import Any, TypeVar

from data_prep.pool import in_processes, processors
from omnimem.errors import OmniMemError

Item = TypeVar("Item")
Result = TypeVar("Result")

TASKS_PER_WORKER = 2
"""Tasks submitted to Ray for each worker: one running, one queued."""

log = logging.getLogger("omnimem.data")


def on_this_machine(
    function: Callable[[Item], Result], tasks: Iterable[Item], workers: int | None = None
) -> Generator[tuple[Item, Result | None], None, None]:
    """Yield each task with its result when it completes, None if its process died; 1 worker runs in this process."""
    workers = workers or processors()
    if workers > 1:
        yield from in_processes(function, tasks, workers)
    else:
        yield from ((task, function(task)) for task in tasks)


def on_ray(
    function: Callable[[Item], Result], tasks: Iterable[Item], workers: int | None = None
) -> Generator[tuple[Item, Result | None], None, None]:
    """Do the same on a running Ray cluster, or on a local one started here; all machines need the same file paths.

    Raises
    ------
    OmniMemError
        Ray is not installed, or the cluster at ``RAY_ADDRESS`` does not answer or stopped.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise OmniMemError("--executor ray needs Ray: pip install 'omnimem[ray]'") from error
    started_here = not ray.is_initialized()
    if started_here:
        _connect(ray, workers)
    pending: dict[Any, Item] = {}
    try:
        remote = ray.remote(function)
        count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        remaining = iter(tasks)
        while True:
            for task in islice(remaining, TASKS_PER_WORKER * count - len(pending)):
                pending[remote.remote(task)] = task
            if not pending:
                return
            for done in ray.wait(list(pending))[0]:
                task = pending.pop(done)
                try:
                    result = ray.get(done)
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
                    result = None  # after Ray has retried it
                yield task, result
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise OmniMemError(f"Ray: {str(error).splitlines()[0]}; run the same command again to resume") from error
    finally:
        for left in pending:
            ray.cancel(left, force=True)
        if started_here:
            ray.shutdown()


def _connect(ray: Any, workers: int | None) -> None:
    """Connect to the cluster at ``RAY_ADDRESS`` or on this machine; start a local one if there is none."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address is not None:
            _check_reachable(address)
        ray.init(address="auto", **quiet)
        log.info("on the Ray cluster at %s", address or "this machine")
    except ConnectionError as error:
        if address is not None:
            raise OmniMemError(f"no Ray cluster answers at RAY_ADDRESS={address}; start it or unset it") from error
        log.info("no Ray cluster found: starting a local one")
        ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)


def _check_reachable(address: str) -> None:
    """Fail within ten seconds if nothing listens there; Ray itself retries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(address) from error


EXECUTORS = {"process": on_this_machine, "ray": on_ray}

"""Where the clips are prepared: in processes of this machine, or on a Ray cluster. Both call the same function.

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

WAITING = 2
"""Tasks handed to Ray for each worker: one at work, one so that it need not wait."""

log = logging.getLogger("omnimem.data")


def on_this_machine(
    function: Callable[[Item], Result], tasks: Iterable[Item], workers: int | None = None
) -> Generator[tuple[Item, Result | None], None, None]:
    """Tasks with their results as they come, None where the process died; of one worker in this process itself."""
    workers = workers or processors()
    if workers > 1:
        yield from in_processes(function, tasks, workers)
    else:
        yield from ((task, function(task)) for task in tasks)


def on_ray(
    function: Callable[[Item], Result], tasks: Iterable[Item], workers: int | None = None
) -> Generator[tuple[Item, Result | None], None, None]:
    """The same on the Ray cluster there is, else on one started here; paths must mean the same on all its machines.

    Raises
    ------
    OmniMemError
        Ray is not installed, or the cluster of ``RAY_ADDRESS`` does not answer, or not any more.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise OmniMemError("--executor ray needs Ray: pip install 'omnimem[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        _join(ray, workers)
    waiting: dict[Any, Item] = {}
    try:
        remote = ray.remote(function)
        count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        remaining = iter(tasks)
        while True:
            for task in islice(remaining, WAITING * count - len(waiting)):
                waiting[remote.remote(task)] = task
            if not waiting:
                return
            for done in ray.wait(list(waiting))[0]:
                task = waiting.pop(done)
                try:
                    result = ray.get(done)
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
                    result = None  # after Ray has tried it again
                yield task, result
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


EXECUTORS = {"process": on_this_machine, "ray": on_ray}

"""Decoding ahead: a thread reads the next chunks of a clip while the model is busy with this one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

POLL = 0.1
"""Seconds after which a thread with a full queue looks whether anybody still wants it."""


def ahead(items: Iterable[T], size: int) -> Iterator[T]:
    """The same items in the same order, at most `size` of them made before they are asked for.

    An error of `items` is raised where the item would have come. A consumer that stops ends the thread.
    """
    if size == 0:
        yield from items
        return
    made: queue.Queue[tuple[str, Any]] = queue.Queue(size)
    unwanted = threading.Event()

    def put(kind: str, value: Any = None) -> bool:
        while not unwanted.is_set():
            try:
                made.put((kind, value), timeout=POLL)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end")
        except BaseException as error:  # whatever it is, it belongs to the consumer
            put("error", error)

    thread = threading.Thread(target=make, name="decode ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        unwanted.set()
        thread.join()

"""Decode the next chunks of a clip in a thread while the model computes the current one.

FFmpeg releases the GIL, so decoding costs no time if a step of the model takes longer than decoding a chunk. Training,
inference and calibration use it::

    for chunk in prefetch(open_media("clip.mp4"), 1):
        stream.step(encoder.encode(chunk))
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

END: Any = object()


def prefetch(items: Iterable[T], size: int) -> Iterator[T]:
    """Yield the items in order, computing up to `size` of them in advance.

    When the consumer stops early, the thread finishes the current item and ends, and the iterator of `items` is closed,
    which closes its file.

    Parameters
    ----------
    items : iterable
        Iterated in one thread.
    size : int
        Number of items computed in advance; 0: no thread, each item is computed on request.

    Raises
    ------
    Exception
        Any error of `items`, in place of the item.
    """
    iterator = iter(items)
    try:
        if size == 0:
            yield from iterator
            return
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
            futures = deque(pool.submit(next, iterator, END) for _ in range(size))
            try:
                while (item := futures.popleft().result()) is not END:
                    futures.append(pool.submit(next, iterator, END))
                    yield item
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        if (close := getattr(iterator, "close", None)) is not None:
            close()

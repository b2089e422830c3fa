"""Decode the next chunks of a clip in a thread while the model works on the present one.

FFmpeg runs without Python's lock, so decoding costs no time where a step of the model takes longer than decoding a
chunk. Training, inference and calibration all read through it::

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
    """Yield the items in order, with up to `size` of them made ahead of the consumer.

    When the consumer stops early, the item being made is finished, the thread ends and the iterator of `items` is
    closed, and with it the file it reads.

    Parameters
    ----------
    items : iterable
        Iterated over in one thread.
    size : int
        Items made or being made while the consumer works on one; 0 makes each when it is asked for, without a thread.

    Raises
    ------
    Exception
        An error of `items`, where its item would have come.
    """
    iterator = iter(items)
    try:
        if size == 0:
            yield from iterator
            return
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
            ahead = deque(pool.submit(next, iterator, END) for _ in range(size))
            try:
                while (item := ahead.popleft().result()) is not END:
                    ahead.append(pool.submit(next, iterator, END))
                    yield item
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        if (close := getattr(iterator, "close", None)) is not None:
            close()

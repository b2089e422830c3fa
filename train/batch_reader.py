"""Reads the clips of a batch side by side, chunk by chunk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

from omnimem.errors import OmniMemError
from omnimem.media import Chunk, MediaError
from omnimem.media.prefetch import prefetch
from train.batch_encoder import Chunks
from train.parallel import ParallelStrategy

log = logging.getLogger("omnimem.train")


class BatchReader:
    """Iterates over the next chunk of every clip, until the clips of all processes in lockstep have ended.

    Parameters
    ----------
    readers : sequence of iterable
        Chunks of each clip.
    prefetch_chunks : int
        Chunks of each clip that a thread decodes in advance.
    strategy : ParallelStrategy
        Processes in lockstep.
    on_damaged : callable, optional
        Called with the number of a clip that turns out to be damaged; the clip then ends. Without it that is an error.
    """

    def __init__(
        self,
        readers: Sequence[Iterable[Chunk]],
        prefetch_chunks: int,
        strategy: ParallelStrategy,
        on_damaged: Callable[[int], None] | None = None,
    ) -> None:
        self._readers, self._prefetch_chunks = readers, prefetch_chunks
        self._strategy, self._on_damaged = strategy, on_damaged

    def __iter__(self) -> Iterator[Chunks]:
        ended = (None,) * len(self._readers)
        side_by_side = zip_longest(*[self._read(number) for number in range(len(self._readers))])
        while True:
            chunks = next(side_by_side, None)
            if not self._strategy.any_process(chunks is not None):
                return
            yield ended if chunks is None else chunks

    def _read(self, number: int) -> Iterator[Chunk]:
        """Chunks of one clip.

        Raises
        ------
        OmniMemError
            The clip is damaged and must not be skipped.
        """
        try:
            yield from prefetch(self._readers[number], self._prefetch_chunks)
        except MediaError as error:
            if self._on_damaged is None:
                raise OmniMemError(f"{error}; data.on_bad_row=skip skips such clips") from error
            log.warning("clip skipped in this step: %s", error)
            self._on_damaged(number)

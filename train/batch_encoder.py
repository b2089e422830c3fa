"""The encoders of a batch of streams, and their recomputation with a graph where they are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from omnimem.backbones import ChunkInputs, StreamEncoder
from omnimem.media import Chunk

Chunks = Sequence[Chunk | None]
"""The next chunk of every stream of a batch; None for a stream that has ended."""

Recompute = Callable[[], ChunkInputs]
"""Computes the same inputs once more, with a graph."""


def encode_chunks(encoders: Sequence[StreamEncoder], chunks: Chunks) -> ChunkInputs:
    """Encode the next chunk of every stream; rows of streams that have ended are padding."""
    return ChunkInputs.batch(
        [
            encoder.empty_step() if chunk is None else encoder.encode(chunk)
            for encoder, chunk in zip(encoders, chunks, strict=True)
        ]
    )


def encode_closing(encoders: Sequence[StreamEncoder]) -> ChunkInputs:
    """Encode the end-of-media tokens (they close the media block before a question)."""
    return ChunkInputs.batch([encoder.closing() for encoder in encoders])


@dataclass(frozen=True)
class EncoderReplay:
    """Encodes again all chunks since the encoders last had an empty buffer.

    Attributes
    ----------
    encoders : sequence of StreamEncoder
        Copies made before the first of the chunks; each replay runs on new copies of them.
    chunks : tuple
        Chunks since then.
    """

    encoders: Sequence[StreamEncoder]
    chunks: tuple[Chunks, ...]

    def last_chunk(self) -> ChunkInputs:
        """Encode the last of the chunks, after the others."""
        encoders = self._run(self.chunks[:-1])
        return encode_chunks(encoders, self.chunks[-1])

    def closing(self) -> ChunkInputs:
        """Encode the end-of-media tokens after the chunks."""
        return encode_closing(self._run(self.chunks))

    def _run(self, earlier: tuple[Chunks, ...]) -> Sequence[StreamEncoder]:
        encoders = [encoder.fork() for encoder in self.encoders]
        for chunks in earlier:
            encode_chunks(encoders, chunks)
        return encoders


class BatchEncoder:
    """The encoders of a batch, one per stream.

    Parameters
    ----------
    encoders : sequence of StreamEncoder
        At the start of their streams.
    train : bool
        Whether part of them is trained, so that the backward pass recomputes their outputs.
    """

    def __init__(self, encoders: Sequence[StreamEncoder], train: bool) -> None:
        self._encoders, self._train = encoders, train
        self._replay = EncoderReplay((), ())

    def prefix(self) -> ChunkInputs:
        """Tokens before the media."""
        return ChunkInputs.batch([encoder.prefix() for encoder in self._encoders])

    def encode(self, chunks: Chunks) -> tuple[ChunkInputs, Recompute | None]:
        """Encode the next chunks; also return how to recompute them if the encoders are trained."""
        if self._train:
            if not self._has_pending_input:
                self._replay = EncoderReplay([encoder.fork() for encoder in self._encoders], ())
            self._replay = EncoderReplay(self._replay.encoders, (*self._replay.chunks, chunks))
        return encode_chunks(self._encoders, chunks), self._replay.last_chunk if self._train else None

    def closing(self) -> tuple[ChunkInputs, Recompute | None]:
        """Encode the end-of-media tokens; return a recomputation too if trained encoders made some."""
        recompute = self._replay.closing if self._train and self._has_pending_input else None
        return encode_closing(self._encoders), recompute

    @property
    def _has_pending_input(self) -> bool:
        """Whether an encoder buffers encoded tokens for a later chunk or the end of the media."""
        return any(encoder.has_pending_input for encoder in self._encoders)

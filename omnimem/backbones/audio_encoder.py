"""Interface of a separate audio encoder, for stream encoders that interleave its output with video tokens."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from omnimem.media import Chunk


class AudioEncoder(Protocol):
    """Audio of a chunk to decoder inputs.

    Attributes
    ----------
    tokens_per_second : float
        Audio tokens per second of audio.
    """

    tokens_per_second: float

    def __call__(self, chunk: Chunk) -> Tensor:
        """Embeddings ``[N, C]`` of the audio tokens of a chunk."""
        ...

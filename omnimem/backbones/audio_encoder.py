"""What turns the sound of a chunk into decoder inputs, for models whose sound and picture come from separate towers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from omnimem.media import Chunk


class AudioEncoder(Protocol):
    """Embeddings of sound.

    Attributes
    ----------
    per_second : float
        Positions a second.
    """

    tokens_per_second: float

    def __call__(self, chunk: Chunk) -> Tensor:
        """Embeddings ``[N, C]`` of a chunk's sound."""
        ...

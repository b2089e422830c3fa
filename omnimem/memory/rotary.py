"""A decoder's rotary embedding as a function on stored keys: take a rotation off, put another one on.

Multi-axis ids (M-RoPE) are merged inside the decoder's own embedding, so whatever it does to its keys happens here.
A decoder with one axis (plain RoPE) turns with the first row alone; the memory keeps three rows for it all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rotary:
    """Rotation of keys to position ids.

    Parameters
    ----------
    embedding : nn.Module
        The decoder's ``rotary_emb``: (states, ids ``[3, B, N]``, or ``[B, N]`` with one axis) → cos and sin
        ``[B, N, D]``.
    """

    def __init__(self, embedding: nn.Module) -> None:
        self.embedding = embedding
        # Every stock embedding that merges axes says how, under this name; that of a plain decoder has no such thing.
        self.multi_axis = hasattr(embedding, "mrope_section")

    def ids(self, rows: Tensor) -> Tensor:
        """Ids ``[3, B, N]`` as the decoder takes them: ``[B, N]`` where it has one axis."""
        return rows if self.multi_axis else rows[0]

    def rotate(self, states: Tensor, position: Tensor) -> Tensor:
        """Rotate states ``[R, G, N, D]`` to ids ``[R, N, 3]``."""
        cos, sin = self._angles(states, position)
        return (states * cos + _rotate_half(states) * sin).to(states.dtype)

    def unrotate(self, states: Tensor, position: Tensor) -> Tensor:
        """Undo `rotate`."""
        cos, sin = self._angles(states, position)
        # Divided by the squared length, so that float32 angles (and YaRN's scaling) cancel to the last bit.
        return ((states * cos - _rotate_half(states) * sin) / (cos**2 + sin**2)).to(states.dtype)

    def _angles(self, states: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin ``[R, 1, N, D]`` in at least float32."""
        dtype = torch.promote_types(states.dtype, torch.float32)
        cos, sin = self.embedding(states.new_empty(0, dtype=dtype), self.ids(position.permute(2, 0, 1)))
        return cos[:, None], sin[:, None]


def _rotate_half(states: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)

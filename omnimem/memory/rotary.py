"""A decoder's rotary embedding as a function on stored keys: remove a rotation, apply another one.

The decoder's own embedding merges multi-axis position ids (M-RoPE), so any scaling it applies to its keys happens here
too. A decoder with 1-D RoPE uses the first row of the ids alone; the cache stores three rows for it all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Rotary:
    """Rotation of keys to position ids.

    Parameters
    ----------
    embedding : nn.Module
        The decoder's ``rotary_emb``: (states, ids ``[3, B, N]``, or ``[B, N]`` for 1-D RoPE) → cos and sin
        ``[B, N, D]``.
    """

    def __init__(self, embedding: nn.Module) -> None:
        self.embedding = embedding
        # Every multi-axis embedding of transformers has this attribute; 1-D embeddings do not.
        self.multi_axis = hasattr(embedding, "mrope_section")

    def decoder_ids(self, ids: Tensor) -> Tensor:
        """Ids ``[3, B, N]`` in the decoder's form: ``[B, N]`` for 1-D RoPE."""
        return ids if self.multi_axis else ids[0]

    def rotate(self, states: Tensor, position_ids: Tensor) -> Tensor:
        """Rotate states ``[R, G, N, D]`` to ids ``[R, N, 3]``."""
        cos, sin = self._angles(states, position_ids)
        return (states * cos + _rotate_half(states) * sin).to(states.dtype)

    def unrotate(self, states: Tensor, position_ids: Tensor) -> Tensor:
        """Undo `rotate`."""
        cos, sin = self._angles(states, position_ids)
        # Divided by the squared length, so that float32 angles (and YaRN's scaling) cancel to the last bit.
        return ((states * cos - _rotate_half(states) * sin) / (cos**2 + sin**2)).to(states.dtype)

    def _angles(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin ``[R, 1, N, D]`` in at least float32."""
        dtype = torch.promote_types(states.dtype, torch.float32)
        cos, sin = self.embedding(states.new_empty(0, dtype=dtype), self.decoder_ids(position_ids.permute(2, 0, 1)))
        return cos[:, None], sin[:, None]


@dataclass(frozen=True)
class KeyRotation:
    """How a layer stores its keys.

    Attributes
    ----------
    rotary : Rotary or None
        The decoder's rotation; None before `omnimem.memory.attach` has bound it.
    stores_unrotated : bool
        Whether keys are stored without their rotation, because their position ids change.
    """

    rotary: Rotary | None
    stores_unrotated: bool

    def to_stored(self, post_rope: Tensor, position_ids: Tensor) -> Tensor:
        """Post-RoPE keys ``[R, G, N, D]`` in the stored form."""
        return self._bound.unrotate(post_rope, position_ids) if self.stores_unrotated else post_rope

    def post_rope(self, stored: Tensor, position_ids: Tensor) -> Tensor:
        """Stored keys, post-RoPE."""
        return self._bound.rotate(stored, position_ids) if self.stores_unrotated else stored

    def unrotated(self, stored: Tensor, position_ids: Tensor) -> Tensor:
        """Stored keys without their rotation."""
        return stored if self.stores_unrotated else self._bound.unrotate(stored, position_ids)

    def stored(self, unrotated: Tensor, position_ids: Tensor) -> Tensor:
        """Keys without rotation in the stored form."""
        return unrotated if self.stores_unrotated else self._bound.rotate(unrotated, position_ids)

    @property
    def _bound(self) -> Rotary:
        if self.rotary is None:
            raise RuntimeError("the cache does not know the decoder's rotary embedding: see omnimem.memory.attach")
        return self.rotary


def _rotate_half(states: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)

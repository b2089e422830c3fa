"""Sketches: random projections of hidden states to a few small integers, whose cosines approximate the originals'.

A sketch (Johnson-Lindenstrauss) costs one byte per number, or half a byte with 4 bits. Cosine similarity does not
depend on scale, so each token is scaled by its largest coordinate and the scale is not stored.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimem.selection.base import compute_dtype
from omnimem.straight_through import straight_through
from omnimem.token_metadata import TokenMetadata

CROSS_MODALITY = 4.0
"""Subtracted from the cosine of tokens of different modalities, so that it is below every cosine."""

TILE = 256
"""New tokens whose similarities to all stored ones exist at once."""


def sketch(hidden: Tensor, size: int, layer: int, seed: int, bits: int = 8) -> Tensor:
    """Sketch of hidden states, differentiable: the rounding is straight-through.

    Parameters
    ----------
    hidden : Tensor
        ``[B, T, C]``.
    size : int
        Numbers per sketch.
    layer, seed : int
        Determine the projection.
    bits : int
        8 or 4: integers up to 127 or 7.

    Returns
    -------
    Tensor
        ``[B, T, size]`` whole numbers in at least float32. The gradient treats the scale as a constant, which is exact
        for everything that depends on cosines alone.
    """
    states = hidden.to(compute_dtype(hidden))
    projected = states @ projection(hidden.shape[-1], size, layer, seed, states.dtype, states.device)
    largest = projected.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(states.dtype).tiny)
    scaled = projected / largest * (2 ** (bits - 1) - 1)
    return straight_through(scaled, scaled.detach().round())


@lru_cache(maxsize=256)
def projection(dim: int, size: int, layer: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Gaussian projection ``[dim, size]`` of a layer, the same in every run."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    return (torch.randn(dim, size, generator=generator) / size**0.5).to(device, dtype)


@torch.no_grad()
def largest_similarity(
    new: Tensor, new_tokens: TokenMetadata, stored: Tensor | None = None, stored_tokens: TokenMetadata | None = None
) -> Tensor:
    """n_k: largest cosine of each new token with a stored or an earlier new token of its modality.

    Parameters
    ----------
    new : Tensor
        ``[B, T, F]`` sketches (or any vectors) of the new tokens.
    new_tokens : TokenMetadata
        Of the T new tokens.
    stored, stored_tokens : optional
        The same of N stored tokens.

    Returns
    -------
    Tensor
        ``[B, T]`` in [-1, 1]; -1 for the first token of a modality, and for padding.
    """
    queries, keys = _with_modality(new, new_tokens, -1), _with_modality(new, new_tokens, 1)
    earlier = None
    if stored is not None and stored_tokens is not None:
        earlier = _with_modality(stored.to(new.dtype), stored_tokens, 1)
    found = []
    for start in range(0, new.shape[1], TILE):
        tile = queries[:, start : start + TILE]
        stop = start + tile.shape[1]
        cosine = tile @ keys[:, :stop].transpose(1, 2)
        later = torch.ones(tile.shape[1], stop, dtype=torch.bool, device=new.device).triu(start)
        largest = cosine.masked_fill_(later, -CROSS_MODALITY).amax(-1)
        if earlier is not None and earlier.shape[1] > 0:
            largest = torch.maximum(largest, (tile @ earlier.transpose(1, 2)).amax(-1))
        found.append(largest)
    return torch.cat(found, 1).clamp(-1, 1)


def _with_modality(vectors: Tensor, tokens: TokenMetadata, sign: int) -> Tensor:
    """Unit vectors with four channels for the modality, so that one product gives cosines within a modality only.

    With sign -1 on one side and 1 on the other, the product is u·v for real tokens of the same modality and
    u·v - `CROSS_MODALITY` for other pairs.
    """
    unit = F.normalize(vectors.to(compute_dtype(vectors)), dim=-1)
    kind = F.one_hot(tokens.modality.long(), 3).to(unit.dtype) * tokens.valid[..., None]
    root = CROSS_MODALITY**0.5
    return torch.cat((unit, root * kind, torch.full_like(kind[..., :1], sign * root)), -1)

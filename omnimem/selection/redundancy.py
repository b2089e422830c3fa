"""Similarity of a token to its neighbours: s_k = ½ [cos(H_k, H_k-1) + cos(H_k, H_k+1)] (arXiv 2606.07577)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimem.modality import EVICTABLE, TEXT


def neighbour_similarity(features: Tensor, valid: Tensor) -> Tensor:
    """Mean cosine similarity of each token with the previous and the next one.

    Parameters
    ----------
    features : Tensor
        ``[B, N, F]`` in stream order.
    valid : Tensor
        bool ``[B, N]``; padding is skipped: neighbours are the nearest real tokens.

    Returns
    -------
    Tensor
        ``[B, N]``; a missing neighbour (first and last token) counts as similarity 1, as in the released code, so the
        ends of the stream are slightly more likely to be evicted.
    """
    if not bool(valid.all()):
        order = torch.sort((~valid).to(torch.int8), dim=1, stable=True).indices
        rows = torch.arange(len(order), device=order.device)[:, None]
        packed = neighbour_similarity_packed(features[rows, order], valid[rows, order])
        return torch.zeros_like(packed).scatter_(1, order, packed)
    return neighbour_similarity_packed(features, valid)


def neighbour_similarity_packed(features: Tensor, valid: Tensor) -> Tensor:
    """`neighbour_similarity` where padding, if any, is at the end of each row."""
    norm = torch.linalg.vector_norm(features, dim=-1).clamp_min(1e-12)
    # As a batch of dot products: the element-wise product would be as large as the features.
    cosine = torch.einsum("bnf,bnf->bn", features[:, 1:], features[:, :-1]) / (norm[:, 1:] * norm[:, :-1])
    cosine = torch.where(valid[:, 1:] & valid[:, :-1], cosine, 1.0)
    return (F.pad(cosine, (1, 0), value=1.0) + F.pad(cosine, (0, 1), value=1.0)) / 2


def redundancy(features: Tensor, modality: Tensor, valid: Tensor, neighbours: str) -> Tensor:
    """Redundancy s ``[B, N]`` with neighbours in the merged ``sequence`` or within one ``modality``."""
    if neighbours == "sequence":
        return neighbour_similarity(features, valid)
    result = torch.zeros(modality.shape, dtype=features.dtype, device=features.device)
    for kind in (TEXT, *EVICTABLE.values()):
        same = (modality == kind) & valid
        result = torch.where(same, neighbour_similarity(features, same), result)
    return result

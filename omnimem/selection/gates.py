"""A soft top-K: gates between 0 and 1 that say how close a candidate is to being retained.

g_k = sigmoid((x_k − τ)/T) over the candidates of one modality, x = log ψ. The threshold τ moves with all scores, and
without its gradient dτ/dx_k = w_k = g_k(1 − g_k) / Σ_j g_j(1 − g_j) training loses most of its effect.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omnimem.selection.base import compute_dtype

BISECTIONS = 60
"""Bisection steps for the threshold: enough for float64."""


def gates(score: Tensor, member: Tensor, count: int, temperature: float, threshold: str = "boundary") -> Tensor:
    """Gates of candidates of which `count` are retained.

    Parameters
    ----------
    score : Tensor
        x ``[R, N]``, in at least float32.
    member : Tensor
        bool ``[R, N]``: the competing candidates.
    count : int
        K.
    temperature : float
        T, above 0.
    threshold : {"boundary", "bisection"}
        τ is the midpoint of the K-th and (K+1)-th score, or makes the gates sum to K.

    Returns
    -------
    Tensor
        ``[R, N]`` in [0, 1]; 0 outside `member`. In rows with at most K members all are 1, and with K = 0 all are
        0, without a gradient.
    """
    x = score.to(compute_dtype(score)).masked_fill(~member, 0)
    fixed = x.detach()
    over_count = member.sum(1, keepdim=True) > count
    tau = (_boundary if threshold == "boundary" else _bisected)(fixed, member, count, temperature)
    # Computed in log space, because g(1 − g) underflows to 0.
    u = ((fixed - tau) / temperature).abs()
    weight = (-u - 2 * torch.log1p(torch.exp(-u))).masked_fill(~member, -torch.inf).softmax(1).nan_to_num(0)
    moving = tau + (weight * (x - fixed)).sum(1, keepdim=True)
    gate = torch.sigmoid((x - moving) / temperature)
    return torch.where(over_count, gate, torch.ones_like(gate)) * (member & (count > 0))


def _boundary(x: Tensor, member: Tensor, count: int, temperature: float) -> Tensor:
    """Midpoint of the K-th and the (K+1)-th score ``[R, 1]``; 0 where there are not so many."""
    width = min(count + 1, x.shape[1])
    top = x.masked_fill(~member, -torch.inf).topk(width, dim=1).values
    middle = (top[:, width - 2 : width - 1] + top[:, width - 1 :]) / 2 if width > 1 else top
    return middle.masked_fill(~middle.isfinite(), 0)


def _bisected(x: Tensor, member: Tensor, count: int, temperature: float) -> Tensor:
    """τ ``[R, 1]`` with Σ g = K."""
    low = x.masked_fill(~member, torch.inf).amin(1, keepdim=True) - 40 * temperature
    high = x.masked_fill(~member, -torch.inf).amax(1, keepdim=True) + 40 * temperature
    low, high = low.masked_fill(~low.isfinite(), 0), high.masked_fill(~high.isfinite(), 0)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = (torch.sigmoid((x - middle) / temperature) * member).sum(1, keepdim=True) > count
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2

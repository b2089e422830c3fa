"""InfiniPot-V (NeurIPS 2025): temporal redundancy of keys (TaR) and norm of values (VaN), without attention scores.

`infinipot_v` compares a key with those of the same patch in recent frames. `infinipot_v_released` is what the
authors' code does after its first compression: each head's retained tokens are split into frames by their column in the
cache, so different patches are compared. (That code also never compresses its last block; here the budget holds.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimem.errors import OmniMemError
from omnimem.modality import AUDIO, EVICTABLE
from omnimem.selection.base import Candidates, SelectionMethod, compute_dtype
from omnimem.selection.topk import dense_rank, topk_mask
from omnimem.token_metadata import TokenMetadata


class InfiniPotV(SelectionMethod):
    """Part of the budget by temporal novelty of keys, the rest by the norm of values; per KV head.

    The most recent frames have priority in the first part.

    TaR of patch p at time t = −mean over the r most recent frames t' of cos(K(t, p), K(t', p)), post-RoPE. An audio
    token is a frame of one patch.

    Parameters
    ----------
    share : float
        Part of the budget given to TaR, recent frames included.
    recent : float
        Recent frames as a part of all frames held; at least one.
    """

    per_head = True
    reads_keys = reads_values = True

    def __init__(self, share: float = 0.5, recent: float = 0.25) -> None:
        for name, value in (("share", share), ("recent", recent)):
            if not 0 <= value <= 1:
                raise OmniMemError(f"selection infinipot_v: {name} must be between 0 and 1, got {value!r}")
        self.share, self.recent = share, recent

    def score(self, candidates: Candidates) -> Tensor:
        """Norm of the value; infinite for tokens retained by TaR."""
        assert candidates.keys is not None and candidates.values is not None
        table, values = candidates.metadata, candidates.values[:, 0]
        keys = F.normalize(candidates.keys[:, 0].to(compute_dtype(values)), dim=-1)
        score = torch.linalg.vector_norm(values.to(keys.dtype), dim=-1)
        for name, kind in EVICTABLE.items():
            competing = (table.modality == kind) & table.valid
            frame, frames, patch = self.grid(table, competing, kind)
            held = (frames * self.recent).floor().clamp_min(1)
            recent = competing & (frames[:, None] - frame <= held[:, None])
            novelty = -_similarity(keys, patch, recent).masked_fill(recent, -torch.inf)
            places = int(getattr(candidates.budget, name) * self.share)
            score[topk_mask(novelty, competing, places)] = torch.inf
        return score

    def grid(self, table: TokenMetadata, competing: Tensor, kind: int) -> tuple[Tensor, Tensor, Tensor]:
        """Frame number ``[R, N]`` of each token, number of frames ``[R]``, patch number ``[R, N]`` of each token."""
        frame, frames = dense_rank(table.time.double(), competing)
        if kind == AUDIO:
            return frame, frames, torch.zeros_like(frame)
        place = table.position_ids[..., 1].double() * 2**20 + table.position_ids[..., 2]
        return frame, frames, dense_rank(place, competing)[0]

    def settings(self) -> dict[str, Any]:
        """Shares."""
        return {"share": self.share, "recent": self.recent}


class InfiniPotVReleased(InfiniPotV):
    """As the authors' code: frame and patch numbers follow from the column in the cache, counted from its end."""

    def grid(self, table: TokenMetadata, competing: Tensor, kind: int) -> tuple[Tensor, Tensor, Tensor]:
        """As in `InfiniPotV.grid`."""
        count = competing.sum(1, keepdim=True)
        from_end = count - competing.cumsum(1)
        newest = table.time.masked_fill(~competing, -torch.inf).amax(1, keepdim=True)
        size = (competing & (table.time == newest)).sum(1, keepdim=True).clamp_min(1)
        frames = (count + size - 1) // size
        return frames - 1 - from_end // size, frames[:, 0], size - 1 - from_end % size


def _similarity(keys: Tensor, patch: Tensor, recent: Tensor) -> Tensor:
    """Mean cosine of unit keys ``[R, N, D]`` with the recent ones of the same patch; 0 where there is none."""
    # Σ_t' k·k' = k·Σ_t' k': one sum for each patch.
    into = patch[..., None].expand_as(keys)
    total = torch.zeros_like(keys).scatter_add_(1, into, keys * recent[..., None])
    count = torch.zeros_like(keys[..., 0]).scatter_add_(1, patch, recent.to(keys.dtype))
    cosine = torch.einsum("rnd,rnd->rn", keys, total.gather(1, into))
    return cosine / count.gather(1, patch).clamp_min(1)

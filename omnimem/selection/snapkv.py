"""SnapKV (arXiv 2404.14469): the tokens that the last queries of a chunk attend to, and these queries."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimem.errors import OmniMemError
from omnimem.selection.base import AttentionScoreSpec, Candidates, SelectionMethod
from omnimem.selection.topk import recent_mask


class SnapKV(SelectionMethod):
    """What the last queries of a chunk attend to, pooled over neighbouring tokens, and these queries; per KV head.

    Parameters
    ----------
    window_size : int
        Number of last queries of a chunk that are observed; their own tokens are always retained.
    kernel_size : int
        Width of the average pooling over tokens in stored order (odd).
    """

    per_head = True

    def __init__(self, window_size: int = 32, kernel_size: int = 5) -> None:
        if window_size < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise OmniMemError(
                "selection snapkv: window_size must be at least 1 and kernel_size odd, got "
                f"window_size={window_size}, kernel_size={kernel_size}"
            )
        self.window_size, self.kernel_size = window_size, kernel_size
        self.attention_scores = AttentionScoreSpec("kv_heads", window=window_size)

    def score(self, candidates: Candidates) -> Tensor:
        """Pooled attention score of the window's queries (mean over the head's group); infinite inside the window."""
        assert candidates.attention_scores is not None
        valid = candidates.metadata.valid
        window = recent_mask(valid, self.window_size)
        return _pooled(candidates.attention_scores, valid & ~window, self.kernel_size).masked_fill(window, torch.inf)

    def accumulate(self, old: Tensor, new: Tensor) -> Tensor:
        """Use the scores of the current chunk alone."""
        return new

    def settings(self) -> dict[str, Any]:
        """Window and kernel sizes."""
        return {"window_size": self.window_size, "kernel_size": self.kernel_size}


def _pooled(values: Tensor, member: Tensor, kernel: int) -> Tensor:
    """Average over `kernel` neighbouring members of a row ``[R, N]``, zeros beyond its ends."""
    order = torch.sort((~member).to(torch.int8), dim=1, stable=True).indices
    packed = values.masked_fill(~member, 0).gather(1, order)
    pooled = F.avg_pool1d(packed[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]
    return torch.zeros_like(values).scatter_(1, order, pooled)

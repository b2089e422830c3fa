"""SnapKV (arXiv 2404.14469): what the last queries of a chunk look at, and those positions themselves."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimem.errors import OmniMemError
from omnimem.selection.base import Candidates, MassSpec, SelectionMethod
from omnimem.selection.topk import newest


class SnapKV(SelectionMethod):
    """What the last queries of a chunk attend to, pooled over neighbouring tokens, and these queries; per KV head.

    Parameters
    ----------
    window : int
        Last queries of a chunk that are observed; the last so many positions always stay.
    kernel : int
        Width of the average pooling over positions in stored order (odd).
    """

    per_head = True

    def __init__(self, window: int = 32, kernel: int = 5) -> None:
        if window < 1 or kernel < 1 or kernel % 2 == 0:
            raise OmniMemError(
                f"selection snapkv: window must be at least 1 and kernel odd, got window={window}, kernel={kernel}"
            )
        self.window, self.kernel = window, kernel
        self.mass = MassSpec("groups", window=window)

    def score(self, candidates: Candidates) -> Tensor:
        """Pooled mass of the window's queries (mean over the head's group); infinite inside the window."""
        assert candidates.mass is not None
        valid = candidates.table.valid
        window = newest(valid, self.window)
        return _pooled(candidates.mass, valid & ~window, self.kernel).masked_fill(window, torch.inf)

    def accumulate(self, old: Tensor, new: Tensor) -> Tensor:
        """Only the present chunk's window counts."""
        return new

    def settings(self) -> dict[str, Any]:
        """Window and kernel."""
        return {"window": self.window, "kernel": self.kernel}


def _pooled(values: Tensor, member: Tensor, kernel: int) -> Tensor:
    """Average over `kernel` neighbouring members of a row ``[R, N]``, zeros beyond its ends."""
    order = torch.sort((~member).to(torch.int8), dim=1, stable=True).indices
    packed = values.masked_fill(~member, 0).gather(1, order)
    pooled = F.avg_pool1d(packed[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]
    return torch.zeros_like(values).scatter_(1, order, pooled)

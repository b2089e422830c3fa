"""TRIM-KV (arXiv 2512.03324): a learned retention gate per token, whose score decays with age.

    score_k = log β_k^(t − k) = (t − k) · log β_k        β_k = sigmoid(head(h_k)) in (0, 1)

for the newest token t. In training the same number is added to the attention logits over the full cache, so that
attention to a token decays; a capacity loss penalises Σ_k β_k^(t − k) above the budget, and the quality loss is the
divergence from the model with a full cache plus the loss of the answers (`tests/benchmarks/rivals_training.py`).

Adapted: the paper has a gate per key-value head and one budget for all tokens; here a token has one gate per layer, and
each modality has its own budget.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from omnimem.selection.base import Candidates
from omnimem.selection.heads import RetentionMethod, ages


class TrimKV(RetentionMethod):
    """Retain the tokens whose gate has decayed least; parameters as in `RetentionMethod`."""

    name = "trim_kv"
    initial_bias = 8.0
    """Before training the score of a token decays by 0.03 % per token."""

    def score(self, candidates: Candidates) -> Tensor:
        """(t − k) · log β_k."""
        return ages(candidates) * F.logsigmoid(super().score(candidates))

"""H2O (arXiv 2306.14048): half of every head's budget for heavy hitters, half for the most recent tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimem.modality import EVICTABLE
from omnimem.selection.base import AttentionScoreSpec, Candidates, SelectionMethod
from omnimem.selection.topk import recent_mask


class H2O(SelectionMethod):
    """Half the budget by attention score accumulated over all chunks, half the most recent tokens; per KV head.

    The score is Σ_q A[q, k] over all chunks, without normalisation by length.

    The score of a key-value head is the mean over its query heads. Of a budget of C tokens of a modality, the last
    ⌈C/2⌉ are retained, and of the others the ⌊C/2⌋ with the highest scores.
    """

    attention_scores = AttentionScoreSpec("kv_heads")
    per_head = True

    def score(self, candidates: Candidates) -> Tensor:
        """Accumulated attention score; infinite for the recent half."""
        assert candidates.attention_scores is not None
        table, score = candidates.metadata, candidates.attention_scores.clone()
        for name, kind in EVICTABLE.items():
            competing = (table.modality == kind) & table.valid
            places = getattr(candidates.budget, name)
            score[recent_mask(competing, places - places // 2)] = torch.inf
        return score

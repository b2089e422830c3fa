"""Dynamic Memory Sparsification, DMS (arXiv 2506.05345): a learned decision per token whether it is evicted.

    score_k = logit of retention of token k = -(logit of its eviction)

In training, token j is evicted with the probability α_j = Gumbel-sigmoid(logit of eviction), and log(1 − α_j) is added
to the attention logits of queries that are more than one delay window later; an auxiliary loss raises the share of
evicted tokens to a target that grows during training, and the uncompressed model is the teacher
(`tests/benchmarks/rivals_training.py`). The decision becomes effective after the delay: here after the chunk.

Adapted: the paper decides per key-value head and evicts every token with α above one half; here a token has one
decision per layer, and the budget retains the tokens with the lowest α.
"""

from __future__ import annotations

from omnimem.selection.heads import RetentionMethod


class DMS(RetentionMethod):
    """Retain the tokens with the highest logit of retention; parameters as in `RetentionMethod`."""

    name = "dms"
    initial_bias = 5.0
    """Before training almost nothing is evicted."""

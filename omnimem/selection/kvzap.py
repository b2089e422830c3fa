"""KVzap (arXiv 2601.07891): a regression from the hidden state to the log of the attention that a token will receive.

    score_k = prediction of log max_q a_qk · ||W_o v_k|| / ||h_q||

over later queries q of a model with a full cache: the score of KVzip+, which the paper computes from a model that
repeats its context, as the authors' code (kvpress) does. The regression is linear or has one hidden layer.

Adapted: the paper predicts one number per key-value head and evicts below a threshold; here a token has one prediction
per layer, the largest over heads, and the budget retains the highest. `tests/benchmarks/rivals_training.py` fits it.
"""

from __future__ import annotations

from omnimem.selection.heads import RetentionMethod


class KVzap(RetentionMethod):
    """Retain the tokens with the highest predicted attention; parameters as in `RetentionMethod`."""

    name = "kvzap"

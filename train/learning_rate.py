"""Learning rate schedule: linear warmup, then a cosine."""

from __future__ import annotations

import math

from omnimem.recipe import TrainConfig


def learning_rate_ratio(step: int, steps: int, train: TrainConfig) -> float:
    """Learning rate of a step (0-based) as a share of the peak: linear warmup, then a cosine to ``min_lr_rate``."""
    warmup = math.ceil(train.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return train.min_lr_rate + (1 - train.min_lr_rate) * cosine

"""Which samples each optimizer step trains on, in a seeded order that a resumed run continues exactly.

The order is a function of the seed and the step alone, so nothing about it is saved: step s of a run has the same rows
on the same ranks whether or not the run was interrupted before.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from omnimem.recipe import TrainConfig
from train.samples import Sample, Samples


class Schedule:
    """Maps optimizer steps to samples.

    Parameters
    ----------
    samples : list of Sample, or Samples
        All usable rows.
    train : TrainConfig
        Batch size, accumulation, seed, number of steps or epochs.
    shuffle : bool
        A new seeded permutation every epoch instead of the manifest's order.
    processes : int
        Ranks that share the batches of a step.
    """

    def __init__(self, samples: list[Sample] | Samples, train: TrainConfig, shuffle: bool, processes: int) -> None:
        self.samples, self.seed, self.shuffle = samples, train.seed, shuffle
        self._batch_size = train.per_device_train_batch_size
        self._samples_per_rank = self._batch_size * train.gradient_accumulation_steps
        self.samples_per_step = self._samples_per_rank * processes
        steps = math.ceil(train.num_train_epochs * len(samples) / self.samples_per_step)
        self.steps = max(1, steps) if train.max_steps is None else train.max_steps
        # A step that ends one epoch and starts the next needs both permutations.
        self._order = lru_cache(maxsize=2)(self._permutation)

    def batches(self, step: int, rank: int) -> list[list[Sample]]:
        """Batches that `rank` runs in a step: one list of samples per accumulation step."""
        first = step * self.samples_per_step + rank * self._samples_per_rank
        samples = [self._sample(first + i) for i in range(self._samples_per_rank)]
        return [samples[i : i + self._batch_size] for i in range(0, len(samples), self._batch_size)]

    def answer_tokens(self, step: int) -> int:
        """Answer tokens of all ranks and batches of a step; its loss is the mean over them."""
        first = step * self.samples_per_step
        return sum(self._sample(first + i).answer_tokens for i in range(self.samples_per_step))

    def epoch(self, step: int) -> float:
        """Passes over the data completed before a step."""
        return step * self.samples_per_step / len(self.samples)

    def _sample(self, number: int) -> Sample:
        epoch, index = divmod(number, len(self.samples))
        return self.samples[int(self._order(epoch)[index]) if self.shuffle else index]

    def _permutation(self, epoch: int) -> Tensor:
        """Row numbers in the order of an epoch: int64 ``[rows]``."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.samples), generator=generator)

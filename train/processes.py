"""How the processes of a run share the work: each with its own copy of the weights, or with DeepSpeed's shards.

A step has many forward and backward passes, and different processes have different numbers of them. Copies need nothing
of each other until the gradients are summed, once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer


class Processes:
    """Each process has a copy of the weights; alone, it is just that.

    Attributes
    ----------
    lockstep : bool
        Whether every process has to run the model equally often.
    """

    lockstep = False

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function that runs the model."""
        return function()

    def backward(self, loss: Tensor) -> None:
        """Add a gradient to those of the step."""
        loss.backward()

    def any(self, here: bool) -> bool:
        """Whether something holds here or, in lockstep, in any process."""
        return here

    def gradient_norm(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """Sum the gradients of all processes, scale them to a norm of at most `limit`, return the norm before."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if dist.is_initialized():
                dist.all_reduce(parameter.grad)
        return nn.utils.clip_grad_norm_(parameters, limit).item()

    def step(self, optimizer: Optimizer) -> None:
        """Change the parameters by the gradients there are."""
        optimizer.step()

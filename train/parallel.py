"""Data parallel training with a full copy of the weights in each process (DDP), or a single process.

A training step consists of many forward and backward passes, and processes run different numbers of them: their streams
differ in length. Torch's DistributedDataParallel is therefore not used: it reduces gradients in each backward pass, so
all processes would need the same number of passes. Here gradients are summed once per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from omnimem.recipe import TrainConfig
from omnimem.selection.heads_file import PARAMETER

ADAM_STATES = ("exp_avg", "exp_avg_sq")
"""Optimizer state of AdamW for each parameter, besides the number of steps."""


def new_optimizer(train: TrainConfig, parameters: dict[str, nn.Parameter]) -> Optimizer:
    """The optimizer of a recipe; each parameter group stores its own peak learning rate."""
    heads = [parameter for name, parameter in parameters.items() if PARAMETER.search(name)]
    full = [parameter for name, parameter in parameters.items() if "modules_to_save" in name]
    others = {id(parameter) for parameter in (*heads, *full)}
    adapters = [parameter for parameter in parameters.values() if id(parameter) not in others]
    groups: list[dict[str, Any]] = [
        {"params": adapters, "peak": train.learning_rate},
        {"params": full, "peak": train.modules_to_save_learning_rate},
        {"params": heads, "peak": train.selection_learning_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if train.optim == "sgd":
        return torch.optim.SGD(groups, lr=train.learning_rate, weight_decay=train.weight_decay)
    betas = (train.adam_beta1, train.adam_beta2)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, weight_decay=train.weight_decay)


class ParallelStrategy:
    """Each process has a copy of the weights; gradients are summed once per optimizer step.

    `train.deepspeed_strategy` overrides the methods for ZeRO.

    Parameters
    ----------
    parameters : dict
        Trainable parameters by name.
    optimizer : Optimizer
        Of these parameters.
    max_grad_norm : float
        Gradients are clipped to this norm.

    Attributes
    ----------
    lockstep : bool
        Whether all processes must make the same number of forward and backward passes (ZeRO-3).
    loss_scale : float
        Factor on the loss that makes the reduced gradient the sum over processes.
    """

    lockstep = False
    loss_scale = 1.0

    def __init__(
        self, parameters: dict[str, nn.Parameter] | None = None, optimizer: Any = None, max_grad_norm: float = math.inf
    ) -> None:
        self.parameters, self.optimizer, self.max_grad_norm = parameters or {}, optimizer, max_grad_norm

    # ---- one step ---------------------------------------------------------------------------------------

    def accumulate(self) -> AbstractContextManager[Any]:
        """Context that contains all backward passes of a step."""
        return nullcontext()

    def call(self, function: Callable[[], Any]) -> Any:
        """Call a function that runs the model."""
        return function()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar to the gradients of the step."""
        loss.backward()

    def any_process(self, flag: bool) -> bool:
        """Whether `flag` is true in this process or, in lockstep, in any process."""
        return flag

    def set_learning_rate(self, ratio: float) -> None:
        """Set the learning rate of the next step as a share of each group's peak."""
        for group in self.optimizer.param_groups:
            group["lr"] = ratio * group["peak"]

    def step(self, apply: bool) -> float:
        """Sum the gradients over processes, clip them, update the parameters and clear the gradients.

        Returns the norm of the gradient before clipping. Without `apply`, or if the norm is not finite, the parameters
        stay as they are.
        """
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if dist.is_initialized():
                dist.all_reduce(parameter.grad)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm).item()
        if apply and math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    # ---- checkpoints ------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """Trained weights by name, complete and on the CPU; all processes must call it."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Optimizer state by name of the state and the parameter, on the CPU; all processes must call it."""
        state = {}
        for name, parameter in self.parameters.items():
            known = self.optimizer.state.get(parameter, {})
            state |= {f"{key}.{name}": known[key].cpu().contiguous() for key in ADAM_STATES if key in known}
            if "step" in known:
                state["step"] = torch.as_tensor(known["step"]).cpu().float()
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Restore a saved optimizer state; SGD has none."""
        if "step" not in state:
            return
        for name, parameter in self.parameters.items():
            moments = {key: state[f"{key}.{name}"].to(parameter.device) for key in ADAM_STATES}
            self.optimizer.state[parameter] = {"step": state["step"].clone(), **moments}

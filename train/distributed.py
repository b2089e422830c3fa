"""The processes of a run: how they find each other, what only the main process does, which strategy they share."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import nn
from torch.distributed import distributed_c10d
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from omnimem.backbones import Backbone
from omnimem.errors import OmniMemError
from omnimem.recipe import Recipe
from train.deepspeed_strategy import DeepSpeedStrategy
from train.launcher import launched_processes, wait_for_error_message
from train.parallel import ParallelStrategy, new_optimizer

Result = TypeVar("Result")


def new_accelerator(timeout: float) -> Accelerator:
    """Join the processes that the launcher started.

    Parameters
    ----------
    timeout : float
        Seconds that a process waits for the others in a collective operation.

    Raises
    ------
    OmniMemError
        The processes do not see each other, or DeepSpeed is configured but disabled.
    """
    gpu = torch.accelerator.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    # Without a GPU: `cpu=True` disables DeepSpeed, and with the default backend a process sees only itself.
    group = InitProcessGroupKwargs(backend=None if gpu else "gloo", timeout=timedelta(seconds=timeout))
    accelerator = Accelerator(
        cpu=not gpu and not deepspeed,
        mixed_precision=None if deepspeed else "no",
        kwargs_handlers=[] if launched_processes() == 1 else [group],
    )
    if deepspeed != (accelerator.distributed_type == DistributedType.DEEPSPEED):
        raise OmniMemError("the launch file configures DeepSpeed but ACCELERATE_USE_CPU disables it: unset it")
    # Models are loaded unsharded; `DeepSpeedStrategy` shards the decoder's layers.
    unset_hf_deepspeed_config()
    world = dist.get_world_size() if dist.is_initialized() else 1
    if accelerator.num_processes != world:
        raise OmniMemError(
            f"{world} processes were launched but {accelerator.num_processes} see each other; launch with "
            "--config_file launch/multi_gpu.yaml or launch/deepspeed_zero2.yaml"
        )
    return accelerator


def new_strategy(accelerator: Accelerator, recipe: Recipe, backbone: Backbone, model: nn.Module) -> ParallelStrategy:
    """Strategy and optimizer for a model whose adapter already has its initial or resumed weights."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = new_optimizer(recipe.train, parameters)
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return ParallelStrategy(parameters, optimizer, recipe.train.max_grad_norm)
    strategy = DeepSpeedStrategy(accelerator, recipe.train.max_grad_norm, backbone, parameters, optimizer)
    _set_timeouts(recipe.train.ddp_timeout)
    return strategy


def from_main_process(function: Callable[[], Result]) -> Result:
    """Call a function in the main process and return its result in all processes.

    Raises
    ------
    Exception
        In the main process, the exception of the function.
    SystemExit
        In the other processes, if the function raises.
    """
    result, failure = None, None
    if PartialState().is_main_process:
        try:
            result = function()
        except Exception as error:  # raised below, after the others are told
            failure = error
    result, failed = broadcast_object_list([result, failure is not None])
    if failure is not None:
        raise failure
    if failed:
        wait_for_error_message()
        raise SystemExit(2)
    return result


def broadcast_value(value: Any) -> Any:
    """Return the main process's value in all processes."""
    return broadcast_object_list([value])[0]


def _set_timeouts(seconds: float) -> None:
    """Set the timeout of all process groups: those that DeepSpeed creates have their backend's default."""
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # its name in older torch
    for group in distributed_c10d._world.pg_map:
        set_timeout(timedelta(seconds=seconds), group)

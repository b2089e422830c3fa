"""How the processes of a run share the work: each with its own copy of the weights, or with DeepSpeed's shards.

A step has many forward and backward passes, and processes have different numbers of them. Copies need nothing of each
other until gradients are summed, once a step. DeepSpeed shards what `Shared` names: the decoder's layers, and with them
the adapter. Under ZeRO-3 every pass gathers weights from all processes, so all make the same passes (`lockstep`);
encoders, embedding and head are whole everywhere, so that no process waits for another's pictures.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.optim import Optimizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from omnimem.backbones import Backbone
from omnimem.backbones.adapter import modules_to_save
from omnimem.errors import OmniMemError
from omnimem.recipe import Recipe, TrainConfig

GRACE_SECONDS = 2.0
"""The launcher ends all processes with the first that fails: the main process needs the time to say why."""

Result = TypeVar("Result")

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW knows of a parameter, beside the number of its steps."""


def new_accelerator(timeout: float) -> Accelerator:
    """The processes this one was launched with.

    Parameters
    ----------
    timeout : float
        Seconds one waits for the others in a collective operation before the run ends.

    Raises
    ------
    OmniMemError
        They do not find each other.
    """
    gpu = torch.accelerator.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    # Without a GPU: `cpu=True` would turn DeepSpeed off, and the default backend finds one process of one.
    group = InitProcessGroupKwargs(backend=None if gpu else "gloo", timeout=timedelta(seconds=timeout))
    accelerator = Accelerator(
        cpu=not gpu and not deepspeed,
        mixed_precision=None if deepspeed else "no",
        kwargs_handlers=[] if alone else [group],
    )
    if deepspeed != (accelerator.distributed_type == DistributedType.DEEPSPEED):
        raise OmniMemError("DeepSpeed was asked for and is off: unset ACCELERATE_USE_CPU")
    # Models are loaded whole: encoders and embedding stay so, and the layers are cut up by `DeepSpeed` below.
    unset_hf_deepspeed_config()
    world = dist.get_world_size() if dist.is_initialized() else 1
    if accelerator.num_processes != world:
        raise OmniMemError(
            f"{world} processes were launched and {accelerator.num_processes} see each other; launch with "
            "--config_file launch/multi_gpu.yaml or launch/deepspeed_zero2.yaml"
        )
    return accelerator


def from_main_process(function: Callable[[], Result]) -> Result:
    """What a function returns in the main process, in all; where it fails, all end and the main process says why.

    Raises
    ------
    Exception
        In the main process, what the function raises.
    SystemExit
        In the others, if it raises.
    """
    result, failure = None, None
    if PartialState().is_main_process:
        try:
            result = function()
        except Exception as error:  # the others wait
            failure = error
    result, failed = broadcast_object_list([result, failure is not None])
    if failure is not None:
        raise failure
    if failed:
        time.sleep(GRACE_SECONDS)
        raise SystemExit(2)
    return result


def new_strategy(accelerator: Accelerator, recipe: Recipe, backbone: Backbone, model: nn.Module) -> ParallelStrategy:
    """Those of the launcher, ready to train a model whose adapter has the weights it is to begin with."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = new_optimizer(recipe.train, parameters)
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return ParallelStrategy(parameters, optimizer, recipe.train.max_grad_norm)
    processes = DeepSpeedStrategy(accelerator, recipe.train.max_grad_norm, backbone, parameters, optimizer)
    _set_timeouts(recipe.train.ddp_timeout)
    return processes


def _set_timeouts(seconds: float) -> None:
    """Set the timeout of all process groups: those that DeepSpeed makes have the default of their backend."""
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # the name in older torch
    for group in distributed_c10d._world.pg_map:
        set_timeout(timedelta(seconds=seconds), group)


def new_optimizer(train: TrainConfig, parameters: dict[str, nn.Parameter]) -> Optimizer:
    """The optimiser of a recipe; each group keeps its own peak of the learning rate."""
    whole = [parameter for name, parameter in parameters.items() if "modules_to_save" in name]
    adapters = [parameter for name, parameter in parameters.items() if "modules_to_save" not in name]
    groups: list[dict[str, Any]] = [{"params": adapters, "peak": train.learning_rate}]
    if whole:
        groups.append({"params": whole, "peak": train.modules_to_save_learning_rate})
    if train.optim == "sgd":
        return torch.optim.SGD(groups, lr=train.learning_rate, weight_decay=train.weight_decay)
    betas = (train.adam_beta1, train.adam_beta2)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, weight_decay=train.weight_decay)


def zero_stage(accelerator: Accelerator) -> int:
    """Stage of ZeRO: 3 shards the weights; 0 without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return _deepspeed_config(accelerator)["zero_optimization"]["stage"]


def _deepspeed_config(accelerator: Accelerator) -> dict[str, Any]:
    plugin: Any = accelerator.state.deepspeed_plugin
    return plugin.deepspeed_config


class ParallelStrategy:
    """Each process has a copy of the weights; alone, it is just that.

    Parameters
    ----------
    parameters : dict
        What is trained, by name.
    optimizer : Optimizer
        Of these parameters.
    limit : float
        Largest norm of a gradient.

    Attributes
    ----------
    lockstep : bool
        Whether every process has to run the model as often as any other.
    weight : float
        What a loss is multiplied with so that gradients are those of the sum over processes.
    """

    lockstep = False
    weight = 1.0

    def __init__(
        self, parameters: dict[str, nn.Parameter] | None = None, optimizer: Any = None, limit: float = math.inf
    ) -> None:
        self.parameters, self.optimizer, self.limit = parameters or {}, optimizer, limit

    # ---- a step -----------------------------------------------------------------------------------------

    def accumulating(self) -> AbstractContextManager[Any]:
        """All backward passes of a step happen inside."""
        return nullcontext()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function that runs the model."""
        return function()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one number to those of the step."""
        loss.backward()

    def any(self, here: bool) -> bool:
        """Whether something holds here or, in lockstep, in any process."""
        return here

    def learning_rate(self, part: float) -> None:
        """Set it for the next step, as a part of each group's peak."""
        for group in self.optimizer.param_groups:
            group["lr"] = part * group["peak"]

    def step(self, wanted: bool) -> float:
        """Change the parameters by the gradients of all processes; the gradients are gone afterwards.

        Returns the gradient's norm before it was limited. Where it is not finite, or the step is not `wanted`, nothing
        changes.
        """
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if dist.is_initialized():
                dist.all_reduce(parameter.grad)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.limit).item()
        if wanted and math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    # ---- what is saved ----------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """Whole trained weights by name, on the CPU; every process calls it."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """What the optimiser knows, by moment and parameter, on the CPU; every process calls it."""
        state = {}
        for name, parameter in self.parameters.items():
            known = self.optimizer.state.get(parameter, {})
            state |= {f"{moment}.{name}": known[moment].cpu().contiguous() for moment in MOMENTS if moment in known}
            if "step" in known:
                state["step"] = torch.as_tensor(known["step"]).cpu().float()
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state; SGD has none."""
        if "step" not in state:
            return
        for name, parameter in self.parameters.items():
            moments = {moment: state[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS}
            self.optimizer.state[parameter] = {"step": state["step"].clone(), **moments}


class _Shared(nn.Module):
    """What DeepSpeed shards, and the one way in that it watches."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.layers, self.norm = backbone.language_model.layers, backbone.language_model.norm
        self.projectors = nn.ModuleList(modules_to_save(backbone.model).values())

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


class DeepSpeedStrategy(ParallelStrategy):
    """ZeRO: optimiser, gradients and (stage 3) weights of the decoder's layers in shards.

    Gradients of a step are held whole and reduced once, so that processes may have different numbers of passes (2), or
    at least need no agreement about their losses (3).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        limit: float,
        backbone: Backbone,
        parameters: dict[str, nn.Parameter],
        optimizer: Optimizer,
    ) -> None:
        import deepspeed

        initialize: Any = deepspeed.initialize
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        super().__init__(parameters, optimizer, limit)
        config = dict(_deepspeed_config(accelerator))
        for ours in ("train_batch_size", "bf16", "fp16"):
            config.pop(ours, None)  # accumulation is ours, and the recipe's model.dtype decides
        config.update(
            train_micro_batch_size_per_gpu=1,
            gradient_accumulation_steps=1,
            gradient_clipping=self.limit,
            zero_allow_untested_optimizer=True,
            zero_force_ds_cpu_optimizer=False,
            steps_per_print=10**9,
        )
        if zero_stage(accelerator) == 3 and any("modules_to_save" in name for name in parameters):
            # Processes would wait for pictures that others do not have.
            raise OmniMemError("lora.modules_to_save: projectors are trained with ZeRO-2 (launch/deepspeed_zero2.yaml)")
        shared = _Shared(backbone)
        self._engine = initialize(
            model=shared, optimizer=optimizer, model_parameters=list(parameters.values()), config=config
        )[0]
        self._device = accelerator.device
        self.optimizer = self._engine.optimizer  # the sharded one, around what was given
        self._inner = self.optimizer.optimizer
        self.lockstep = zero_stage(accelerator) == 3
        self.weight = float(accelerator.num_processes)  # gradients are averaged
        inside = {id(tensor) for tensor in (*shared.parameters(), *shared.buffers())}
        for tensor in (*backbone.model.parameters(), *backbone.model.buffers()):
            if id(tensor) not in inside:
                tensor.data = tensor.data.to(self._device)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Hold the gradients whole until the step ends."""
        # Entered by hand: after an error here the other processes make no reduction that this one could join.
        self._held = self._engine.coalesce_grad_reduction()
        self._held.__enter__()
        yield
        for parameter in self.parameters.values():
            if parameter.grad is None:  # nothing was asked here, or nothing seen
                parameter.grad = torch.zeros_like(parameter)
        self._held.__exit__(None, None, None)

    def call(self, function: Callable[[], Any]) -> Any:
        """Through the engine."""
        return self._engine(function)

    def backward(self, loss: Tensor) -> None:
        """Through the engine."""
        self._engine.backward(loss)

    def any(self, here: bool) -> bool:
        """Asks the others in lockstep."""
        if not self.lockstep:
            return here
        flag = torch.tensor(float(here), device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def step(self, wanted: bool) -> float:
        """One step of the engine, which leaves everything as it is where the norm is not finite."""
        if not wanted:
            self._engine.zero_grad()
            self.optimizer.zero_grad()
            return math.nan
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return norm if norm >= 0 else math.nan  # -1 where it was not finite

    def weights(self) -> dict[str, Tensor]:
        """Put together from all shards."""
        from deepspeed.utils import safe_get_full_fp32_param

        whole: Any = safe_get_full_fp32_param
        return {name: whole(parameter).detach().cpu().clone() for name, parameter in self.parameters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Put together from all shards."""
        from deepspeed.utils import safe_get_full_optimizer_state

        known = next(iter(self._inner.state.values()), {})
        if "step" not in known:
            return {}
        state = {"step": torch.as_tensor(known["step"]).cpu().float()}
        for name, parameter in self.parameters.items():
            for moment in MOMENTS:
                whole: Any = safe_get_full_optimizer_state(parameter, moment)
                state[f"{moment}.{name}"] = whole.cpu().contiguous().clone()
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Cut into shards. The optimiser makes its state in its first step, so here it is made for it."""
        from deepspeed.utils import safe_set_full_optimizer_state

        if "step" not in state:
            return
        zero = self.optimizer
        flats = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
        for flat in flats:
            self._inner.state[flat] = {"step": state["step"].clone(), **{m: torch.zeros_like(flat) for m in MOMENTS}}
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.parameters.items():
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{moment}.{name}"], moment)

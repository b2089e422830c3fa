"""DeepSpeed ZeRO: optimizer state, gradients and (stage 3) weights of the decoder's layers are sharded over processes.

Under ZeRO-3 every pass gathers weights from all processes, so all processes make the same passes (`lockstep`).
Encoders, embedding and head are not sharded, so that a process without frames to encode never makes others wait.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from omnimem.backbones import Backbone
from omnimem.backbones.adapter import modules_to_save
from omnimem.errors import OmniMemError
from train.parallel import ADAM_STATES, ParallelStrategy


def zero_stage(accelerator: Accelerator) -> int:
    """Stage of ZeRO (3 shards the weights); 0 without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return _launch_config(accelerator)["zero_optimization"]["stage"]


def _launch_config(accelerator: Accelerator) -> dict[str, Any]:
    plugin: Any = accelerator.state.deepspeed_plugin
    return plugin.deepspeed_config


class ShardedModules(nn.Module):
    """The modules that DeepSpeed shards: the decoder's layers with their adapters, the norm, trained projectors.

    Its forward calls a function that runs the model, because DeepSpeed's hooks are active inside `forward` only.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.layers, self.norm = backbone.language_model.layers, backbone.language_model.norm
        self.projectors = nn.ModuleList(modules_to_save(backbone.model).values())

    def forward(self, function: Callable[[], Any]) -> Any:
        """Call the function."""
        return function()


class DeepSpeedStrategy(ParallelStrategy):
    """ZeRO-2 or ZeRO-3.

    Each process accumulates unsharded gradients during a step and reduces them once at its end. Under ZeRO-2 processes
    may therefore make different numbers of passes. Under ZeRO-3 a process may have a loss that is not finite: no
    gradient is exchanged before the end of the step, whose update is then skipped.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        max_grad_norm: float,
        backbone: Backbone,
        parameters: dict[str, nn.Parameter],
        optimizer: Optimizer,
    ) -> None:
        import deepspeed

        initialize: Any = deepspeed.initialize
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        super().__init__(parameters, optimizer, max_grad_norm)
        stage = zero_stage(accelerator)
        if stage == 3 and any("modules_to_save" in name for name in parameters):
            # A process would gather projector weights for frames that the others do not have.
            raise OmniMemError("lora.modules_to_save: projectors are trained with ZeRO-2 (launch/deepspeed_zero2.yaml)")
        sharded = ShardedModules(backbone)
        self._engine = initialize(
            model=sharded,
            optimizer=optimizer,
            model_parameters=list(parameters.values()),
            config=self._engine_config(accelerator),
        )[0]
        self._device = accelerator.device
        self.optimizer = self._engine.optimizer  # DeepSpeed's wrapper around `optimizer`
        self._inner = self.optimizer.optimizer
        self.lockstep = stage == 3
        self.loss_scale = float(accelerator.num_processes)  # DeepSpeed averages gradients
        _move_others(backbone.model, sharded, self._device)

    def _engine_config(self, accelerator: Accelerator) -> dict[str, Any]:
        config = dict(_launch_config(accelerator))
        for key in ("train_batch_size", "bf16", "fp16"):
            config.pop(key, None)  # the loop accumulates, and the recipe's model.dtype sets the precision
        return {
            **config,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Keep the gradients unreduced until the step ends."""
        # Not a `with` block: gradients are reduced once per step, when this context exits. If one process raised an
        # error, the exit would start a reduction that the others never join, and the process would hang.
        self._unreduced = self._engine.coalesce_grad_reduction()
        self._unreduced.__enter__()
        yield
        for parameter in self.parameters.values():
            if parameter.grad is None:  # no loss of this process depends on it
                parameter.grad = torch.zeros_like(parameter)
        self._unreduced.__exit__(None, None, None)

    def call(self, function: Callable[[], Any]) -> Any:
        """Call a function that runs the model, inside the engine's forward."""
        return self._engine(function)

    def backward(self, loss: Tensor) -> None:
        """Differentiate with the engine."""
        self._engine.backward(loss)

    def any_process(self, flag: bool) -> bool:
        """Whether `flag` is true in this process or, in lockstep, in any process."""
        if not self.lockstep:
            return flag
        reduced = torch.tensor(float(flag), device=self._device)
        dist.all_reduce(reduced, dist.ReduceOp.MAX)
        return bool(reduced)

    def step(self, apply: bool) -> float:
        """One step of the engine, which skips the update if the norm is not finite."""
        if not apply:
            self._engine.zero_grad()
            self.optimizer.zero_grad()
            return math.nan
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return norm if norm >= 0 else math.nan  # DeepSpeed reports -1 if it was not finite

    def weights(self) -> dict[str, Tensor]:
        """Trained weights by name, gathered from all shards."""
        from deepspeed.utils import safe_get_full_fp32_param

        gather: Any = safe_get_full_fp32_param
        return {name: gather(parameter).detach().cpu().clone() for name, parameter in self.parameters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Optimizer state, gathered from all shards."""
        from deepspeed.utils import safe_get_full_optimizer_state

        known = next(iter(self._inner.state.values()), {})
        if "step" not in known:
            return {}
        state = {"step": torch.as_tensor(known["step"]).cpu().float()}
        for name, parameter in self.parameters.items():
            for key in ADAM_STATES:
                full: Any = safe_get_full_optimizer_state(parameter, key)
                state[f"{key}.{name}"] = full.cpu().contiguous().clone()
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Shard a saved optimizer state. The optimizer creates its state in its first step, so it is created here."""
        from deepspeed.utils import safe_set_full_optimizer_state

        if "step" not in state:
            return
        zero = self.optimizer
        shards = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
        for flat in shards:
            zeros = {key: torch.zeros_like(flat) for key in ADAM_STATES}
            self._inner.state[flat] = {"step": state["step"].clone(), **zeros}
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.parameters.items():
            for key in ADAM_STATES:
                safe_set_full_optimizer_state(parameter, state[f"{key}.{name}"], key)


def _move_others(model: nn.Module, sharded: nn.Module, device: torch.device) -> None:
    """Move every tensor that is not sharded to the device."""
    inside = {id(tensor) for tensor in (*sharded.parameters(), *sharded.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)

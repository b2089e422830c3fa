"""Checkpoints of a run: everything a killed run needs to go on to the same result, in safetensors and JSON.

    <output_dir>/checkpoints/step-00000040/
        adapter_model.safetensors, adapter_config.json, budget_profile.json    usable as an adapter by itself
        optimizer.safetensors, rng-0.safetensors (one a rank), state.json

A checkpoint folder appears under its name only when complete. No pickle is written or read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from omnimem.budget import PROFILE_FILE, BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.files import atomic_directory, atomic_write_json, remove_directory, sweep

FOLDER = "checkpoints"
ADAPTER = ".adapter"
RECORDS = ".records"


def save_adapter(folder: Path, model: PeftModel, profile: BudgetProfile) -> None:
    """Write adapter and profile into an existing folder, each file complete or absent."""
    with atomic_directory(folder / ADAPTER, overwrite=True) as temporary:
        model.save_pretrained(str(temporary), safe_serialization=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / ADAPTER / name).replace(folder / name)
    shutil.rmtree(folder / ADAPTER)
    profile.save(folder / PROFILE_FILE)


def save_checkpoint(
    output_dir: Path,
    step: int,
    accelerator: Accelerator,
    model: PeftModel,
    optimizer: Optimizer,
    profile: BudgetProfile,
    keep: int,
) -> Path:
    """Save after `step` optimiser steps and drop all but the newest `keep` checkpoints; every rank calls it."""
    target = output_dir / FOLDER / f"step-{step:08d}"
    random_states = gather_object([_rng_state()])
    if accelerator.is_main_process:
        with atomic_directory(target, overwrite=True) as folder:
            save_adapter(folder, model, profile)
            tensors, rest = _flatten(optimizer)
            save_file(tensors, folder / "optimizer.safetensors")
            for rank, random_state in enumerate(random_states):
                save_file(random_state, folder / f"rng-{rank}.safetensors")
            state = {"step": step, "processes": accelerator.num_processes, "optimizer": rest}
            atomic_write_json(folder / "state.json", state)
        for old in checkpoints(output_dir)[:-keep]:
            remove_directory(old)
    accelerator.wait_for_everyone()
    return target


def sweep_run(output_dir: Path) -> None:
    """Delete what a killed run left of unfinished writes."""
    for folder in (output_dir, output_dir / FOLDER):
        sweep(folder)
    for name in (ADAPTER, RECORDS):
        if (output_dir / name).is_dir():
            shutil.rmtree(output_dir / name)


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((output_dir / FOLDER).glob("step-*"))


def load_checkpoint(folder: Path, accelerator: Accelerator, model: PeftModel, optimizer: Optimizer) -> int:
    """Bring adapter, optimiser and this rank's random state back; returns the number of steps done.

    Raises
    ------
    OmniMemError
        A file is missing or damaged, the adapter has another shape, or the number of processes differs.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["processes"] != accelerator.num_processes:
            raise OmniMemError(
                f"{folder}: saved by {state['processes']} processes, resumed by {accelerator.num_processes}; "
                "use the same number or start anew in another output_dir"
            )
        weights = load_file(folder / "adapter_model.safetensors", device=str(accelerator.device))
        if odd := weights.keys() ^ get_peft_model_state_dict(model).keys():
            raise ValueError(f"adapter weights missing or too many, such as {sorted(odd)[0]}")
        set_peft_model_state_dict(model, weights)
        _unflatten(optimizer, load_file(folder / "optimizer.safetensors"), state["optimizer"])
        _set_rng_state(load_file(folder / f"rng-{accelerator.process_index}.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OmniMemError(
            f"{folder}: checkpoint does not load ({type(error).__name__}: {reason}); "
            "delete it to resume from an older one"
        ) from error
    return state["step"]


def _flatten(optimizer: Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Optimiser state as named tensors and plain JSON."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value.contiguous()
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    groups = [{**group, "betas": list(group["betas"])} for group in state["param_groups"]]
    return tensors, {"param_groups": groups}


def _unflatten(optimizer: Optimizer, tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = [{**group, "betas": tuple(group["betas"])} for group in rest["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

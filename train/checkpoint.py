"""Checkpoints of a run: everything needed to continue to the same result, in safetensors and JSON.

    <output_dir>/checkpoints/step-00000040/
        adapter_model.safetensors, adapter_config.json, budget_profile.json    a complete adapter
        selection.safetensors                                                  heads of selection.method=learned
        optimizer.safetensors, rng-0.safetensors (one per rank), state.json

A checkpoint folder gets its name when it is complete. No pickle is written or read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from omnimem.budget import PROFILE_FILE, BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.files import atomic_directory, atomic_write_json, remove_directory, remove_leftovers
from omnimem.selection.heads_file import HEADS_FILE, heads_in, save_heads
from train.parallel import ParallelStrategy

CHECKPOINTS_FOLDER = "checkpoints"
TEMPORARY_ADAPTER_FOLDER = ".adapter"
EVICTED_FOLDER = ".evicted"


def save_adapter(
    folder: Path, model: Any, profile: BudgetProfile, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write adapter, selection heads (those that are trained) and profile into an existing folder.

    Each file is complete or absent.

    Parameters
    ----------
    folder : Path
        Existing folder.
    model : PeftModel or PreTrainedModel
        The model, with or without an adapter.
    profile : BudgetProfile
        Its budgets; the file also records the SHA-256 of the heads.
    weights : dict, optional
        Trained weights by the names of the model's parameters; the model's own if omitted.
    """
    if isinstance(model, PeftModel):
        with atomic_directory(folder / TEMPORARY_ADAPTER_FOLDER, overwrite=True) as temporary:
            model.save_pretrained(
                str(temporary), state_dict=weights, safe_serialization=True, save_embedding_layers=False
            )
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / TEMPORARY_ADAPTER_FOLDER / name).replace(folder / name)
        shutil.rmtree(folder / TEMPORARY_ADAPTER_FOLDER)
    heads = heads_in(weights or dict(model.named_parameters()))
    if heads:
        heads = {name: weight.detach().cpu().contiguous() for name, weight in heads.items()}
        base = str(model.config._name_or_path)
        digest = save_heads(folder / HEADS_FILE, heads, profile.model, base, profile.selection)
        profile = replace(profile, selection_heads=digest)
    profile.save(folder / PROFILE_FILE)


def save_checkpoint(
    output_dir: Path,
    step: int,
    accelerator: Accelerator,
    model: Any,
    strategy: ParallelStrategy,
    profile: BudgetProfile,
    keep: int,
) -> Path:
    """Save after `step` optimizer steps and delete all but the newest `keep` checkpoints; every rank calls it."""
    target = output_dir / CHECKPOINTS_FOLDER / f"step-{step:08d}"
    random_states = gather_object([_rng_state(accelerator.device)])
    weights, optimizer_state = strategy.weights(), strategy.optimizer_state()
    if accelerator.is_main_process:
        with atomic_directory(target, overwrite=True) as folder:
            save_adapter(folder, model, profile, weights)
            save_file(optimizer_state, folder / "optimizer.safetensors")
            for rank, random_state in enumerate(random_states):
                save_file(random_state, folder / f"rng-{rank}.safetensors")
            atomic_write_json(folder / "state.json", {"step": step, "processes": accelerator.num_processes})
        for old in checkpoints(output_dir)[:-keep]:
            remove_directory(old)
    accelerator.wait_for_everyone()
    return target


def remove_unfinished_files(output_dir: Path) -> None:
    """Delete unfinished files of a killed run."""
    for folder in (output_dir, output_dir / CHECKPOINTS_FOLDER):
        remove_leftovers(folder)
    for name in (TEMPORARY_ADAPTER_FOLDER, EVICTED_FOLDER):
        if (output_dir / name).is_dir():
            shutil.rmtree(output_dir / name)


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((output_dir / CHECKPOINTS_FOLDER).glob("step-*"))


def load_weights(folder: Path, accelerator: Accelerator, model: Any) -> int:
    """Load adapter and selection heads, before they are sharded; return the number of completed steps.

    Raises
    ------
    OmniMemError
        A file is missing or damaged, the adapter has another shape, or the number of processes differs.
    """
    with _readable_errors(folder):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["processes"] != accelerator.num_processes:
            raise OmniMemError(
                f"{folder}: saved by {state['processes']} processes, resumed by {accelerator.num_processes}; "
                "use the same number of processes or another output_dir"
            )
        if isinstance(model, PeftModel):
            weights = load_file(folder / "adapter_model.safetensors")
            if mismatch := weights.keys() ^ get_peft_model_state_dict(model).keys():
                raise ValueError(f"adapter weights are missing or unexpected, such as {sorted(mismatch)[0]}")
            set_peft_model_state_dict(model, weights)
        if heads := heads_in(dict(model.named_parameters())):
            saved = load_file(folder / HEADS_FILE)
            if mismatch := saved.keys() ^ heads.keys():
                raise ValueError(f"weights of selection heads are missing or unexpected, such as {sorted(mismatch)[0]}")
            for name, parameter in heads.items():
                parameter.data.copy_(saved[name])
        return state["step"]


def load_optimizer_and_rng(folder: Path, accelerator: Accelerator, strategy: ParallelStrategy) -> None:
    """Load the optimizer state and this rank's random state.

    Raises
    ------
    OmniMemError
        A file is missing or damaged.
    """
    with _readable_errors(folder):
        strategy.load_optimizer_state(load_file(folder / "optimizer.safetensors"))
        _set_rng_state(load_file(folder / f"rng-{accelerator.process_index}.safetensors"), accelerator.device)


@contextmanager
def _readable_errors(folder: Path) -> Iterator[None]:
    """Turn any error of loading into one line that names the checkpoint."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OmniMemError(
            f"{folder}: cannot load the checkpoint ({type(error).__name__}: {reason}); "
            "delete it to resume from an older one"
        ) from error


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)

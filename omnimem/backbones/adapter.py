"""Load saved LoRA adapters: find their base model, translate their keys, check that every weight is used.

Adapters saved by other code or older libraries have the key names of published checkpoints, list target modules by
their last name component, which also matches modules of the encoders, and lack `nn.Parameter`s held directly by saved
modules. They are converted before loading.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from omnimem.backbones.base import Backbone
from omnimem.backbones.checkpoint import quiet_transformers
from omnimem.errors import OmniMemError
from omnimem.selection.heads_file import HEADS_FILE, described

ADAPTER_CONFIG = "adapter_config.json"
CONFIG = "config.json"
"""Configuration of a complete model: a folder with it is a checkpoint, not an adapter."""

PREFIX = "base_model.model."
"""Prefix of PEFT before the weight names of a model."""

RECIPE_FILE = "recipe.yaml"
BASE_FOLDER = "base"
"""Folder of the base model in a run directory, if the run built it (``model.name_or_path=tiny``)."""


def resolve_checkpoint(path: str | Path, adapter: str | Path | None) -> tuple[str | Path, str | Path | None]:
    """Base model and adapter for a path that is a model, an export or a run directory.

    Raises
    ------
    OmniMemError
        A run directory without an adapter, or an adapter without a readable base model name.
    """
    folder = Path(path)
    if adapter is None:
        if (folder / RECIPE_FILE).is_file() and not _has_weights(folder):
            saved = sorted(folder.glob("checkpoints/step-*"))
            instead = f", or use its checkpoint {saved[-1]}" if saved else ""
            raise OmniMemError(
                f"{path}: a run directory without an adapter; let the training finish or resume it{instead}"
            )
        if not _has_weights(folder) or (folder / CONFIG).is_file():
            return path, None
        adapter, path = folder, _base_of(folder)
    elif not _has_weights(Path(adapter)):
        raise OmniMemError(f"{adapter}: no {ADAPTER_CONFIG}; give a folder with a saved LoRA adapter")
    return path, adapter


def has_lora(adapter: str | Path) -> bool:
    """Whether a folder holds a LoRA adapter; a run with ``lora.r=0`` saves selection heads alone."""
    return (Path(adapter) / ADAPTER_CONFIG).is_file()


def _has_weights(folder: Path) -> bool:
    return has_lora(folder) or (folder / HEADS_FILE).is_file()


def _base_of(adapter: Path) -> str:
    """Base model of an adapter: the one in the run directory, if any, else the one named in the configuration."""
    try:
        base = (
            json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
            if has_lora(adapter)
            else described(adapter / HEADS_FILE)["base"]
        )
    except (ValueError, KeyError):
        raise OmniMemError(f"{adapter / ADAPTER_CONFIG}: not readable or without base_model_name_or_path") from None
    in_run = adapter / BASE_FOLDER
    return str(in_run) if in_run.is_dir() else base


def modules_to_save(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of PEFT's `modules_to_save` (trained copies that replace the original) by their name in `model`."""
    return {
        name: module.modules_to_save["default"]
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def load_adapter(backbone: Backbone, adapter: str | Path) -> Any:
    """Load a saved LoRA adapter into a backbone; returns the PeftModel around `backbone.model`.

    Raises
    ------
    OmniMemError
        Files are missing or damaged, or adapter weights do not match the modules of the model.
    """
    weights = Path(adapter) / "adapter_model.safetensors"
    if not weights.is_file():
        raise OmniMemError(f"{adapter}: no adapter_model.safetensors; the adapter was not saved completely")
    try:
        with quiet_transformers():
            config = PeftConfig.from_pretrained(str(adapter))
            config.inference_mode = True
            saved = _convert(load_file(weights), config, backbone)
            peft_model = PeftModel(backbone.model, config).eval()
            set_peft_model_state_dict(peft_model, saved)
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OmniMemError(f"{adapter}: adapter does not load onto {backbone.model_id}: {reason}") from error
    present = set(get_peft_model_state_dict(peft_model))
    if set(saved) != present:
        mismatched = sorted(set(saved) ^ present)
        raise OmniMemError(
            f"{adapter}: {len(mismatched)} adapter weights do not match {backbone.model_id}, "
            f"for example {mismatched[0]}; use the adapter with the model it was trained on"
        )
    return peft_model


def _convert(saved: dict[str, Tensor], config: Any, backbone: Backbone) -> dict[str, Tensor]:
    """Adapter weights with the key names of `backbone.model`; sets target modules and modules to save in `config`.

    An adapter saved by OmniMem is returned unchanged.
    """
    base = backbone.model.state_dict()
    modules = {name for name, _ in backbone.model.named_modules()}
    renamings = [
        entry
        for entry in get_model_conversion_mapping(backbone.model, add_legacy=False)
        if isinstance(entry, WeightRenaming)
    ]

    def renamed(key: str) -> str:
        name = key.removeprefix(PREFIX)
        if name in base or name.partition(".lora_")[0] in modules:
            return key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return PREFIX + name

    converted = {renamed(key): weight for key, weight in saved.items()}
    if isinstance(config.target_modules, str) and converted.keys() == saved.keys():
        return converted
    adapted = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in converted if ".lora_" in key}
    config.target_modules = sorted(adapted)
    # Weights without LoRA belong to modules that were trained in full: the projectors.
    full = {key.removeprefix(PREFIX) for key in converted if ".lora_" not in key}
    replaced = [name for name in backbone.projectors.values() if any(f".{name}." in f".{key}" for key in full)]
    config.modules_to_save = replaced or None
    for name in replaced:
        for key in base:
            _, inside, rest = f".{key}".partition(f".{name}.")
            if inside and "." not in rest and PREFIX + key not in converted:
                # A parameter held directly by the module, which other code does not save: take it from the base.
                converted[PREFIX + key] = base[key]
    return converted

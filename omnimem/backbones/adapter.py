"""LoRA adapters on disk: which base they belong to, and putting them on it without a silent no-op.

Adapters saved by older libraries name modules as the published checkpoints do, list projections by bare names that
encoders have too, and lack parameters that stand by themselves; here they are translated before they are loaded.
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

ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT writes before the names of a model's weights."""

RECIPE_FILE = "recipe.yaml"
BASE_FOLDER = "base"
"""Where a run keeps its own base model when that was built on the spot (``model.name_or_path=tiny``)."""


def resolve_checkpoint(path: str | Path, adapter: str | Path | None) -> tuple[str | Path, str | Path | None]:
    """Base model and adapter behind a path that may be a model, an export or a run directory.

    Raises
    ------
    OmniMemError
        A run directory without adapter, or an adapter whose base cannot be found.
    """
    folder = Path(path)
    if adapter is None:
        if (folder / RECIPE_FILE).is_file() and not (folder / ADAPTER_CONFIG).is_file():
            saved = sorted(folder.glob("checkpoints/step-*"))
            instead = f", or use its checkpoint {saved[-1]}" if saved else ""
            raise OmniMemError(
                f"{path}: a run directory without an adapter; let the training finish or resume it{instead}"
            )
        if not (folder / ADAPTER_CONFIG).is_file():
            return path, None
        adapter, path = folder, _base_of(folder)
    elif not (Path(adapter) / ADAPTER_CONFIG).is_file():
        raise OmniMemError(f"{adapter}: no {ADAPTER_CONFIG}; give a folder with a saved LoRA adapter")
    return path, adapter


def _base_of(adapter: Path) -> str:
    """Base model an adapter names; a run that carries its own base may have been moved."""
    try:
        base = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError):
        raise OmniMemError(f"{adapter / ADAPTER_CONFIG}: not readable or without base_model_name_or_path") from None
    carried = adapter / BASE_FOLDER
    return str(carried) if carried.is_dir() else base


def modules_to_save(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that an adapter replaces instead of adding to them, by the name they have in `model`."""
    return {
        name: module.modules_to_save["default"]
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def load_adapter(backbone: Backbone, adapter: str | Path) -> Any:
    """Put a saved LoRA adapter on a backbone; returns the PeftModel around `backbone.model`.

    Raises
    ------
    OmniMemError
        Files missing or damaged, or weights that fit no module (an adapter of another model would be a no-op).
    """
    weights = Path(adapter) / "adapter_model.safetensors"
    if not weights.is_file():
        raise OmniMemError(f"{adapter}: no adapter_model.safetensors; the adapter was not saved completely")
    try:
        with quiet_transformers():
            config = PeftConfig.from_pretrained(str(adapter))
            config.inference_mode = True
            saved = _translated(load_file(weights), config, backbone)
            peft_model = PeftModel(backbone.model, config).eval()
            set_peft_model_state_dict(peft_model, saved)
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OmniMemError(f"{adapter}: adapter does not load onto {backbone.model_id}: {reason}") from error
    present = set(get_peft_model_state_dict(peft_model))
    if set(saved) != present:
        odd = sorted(set(saved) ^ present)
        raise OmniMemError(
            f"{adapter}: {len(odd)} adapter weights do not match {backbone.model_id}, for example {odd[0]}; "
            "use the adapter with the model it was trained on"
        )
    return peft_model


def _translated(saved: dict[str, Tensor], config: Any, backbone: Backbone) -> dict[str, Tensor]:
    """The weights of an adapter under our model's names; `config` then says which modules they belong to.

    An adapter of our own is passed through as it is.
    """
    base = backbone.model.state_dict()
    modules = {name for name, _ in backbone.model.named_modules()}
    renamings = [
        one for one in get_model_conversion_mapping(backbone.model, add_legacy=False) if isinstance(one, WeightRenaming)
    ]

    def ours(key: str) -> str:
        name = key.removeprefix(PREFIX)
        if name in base or name.partition(".lora_")[0] in modules:
            return key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return PREFIX + name

    found = {ours(key): weight for key, weight in saved.items()}
    if isinstance(config.target_modules, str) and found.keys() == saved.keys():
        return found
    adapted = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in found if ".lora_" in key}
    config.target_modules = sorted(adapted)
    # Modules that were trained whole are those that recipes know as projectors.
    whole = {key.removeprefix(PREFIX) for key in found if ".lora_" not in key}
    replaced = [name for name in backbone.projectors.values() if any(f".{name}." in f".{key}" for key in whole)]
    config.modules_to_save = replaced or None
    for name in replaced:
        for key in base:
            _, inside, rest = f".{key}".partition(f".{name}.")
            if inside and "." not in rest and PREFIX + key not in found:
                # PEFT saves modules, and this parameter stands by itself.
                found[PREFIX + key] = base[key]
    return found

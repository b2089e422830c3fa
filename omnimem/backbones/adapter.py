"""LoRA adapters on disk: which base they belong to, and putting them on it without a silent no-op."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from omnimem.backbones.base import Backbone
from omnimem.backbones.checkpoint import quiet_stock
from omnimem.errors import OmniMemError

ADAPTER_CONFIG = "adapter_config.json"
RECIPE_FILE = "recipe.yaml"
BASE_FOLDER = "base"
"""Where a run keeps its own base model when that was built on the spot (``model.path=tiny``)."""


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


def trained_whole(model: nn.Module) -> dict[str, nn.Module]:
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
        with quiet_stock():
            peft_model = PeftModel.from_pretrained(backbone.model, str(adapter))
        saved = set(load_file(weights))
    except (SafetensorError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OmniMemError(f"{adapter}: adapter does not load onto {backbone.model_id}: {reason}") from error
    present = set(get_peft_model_state_dict(peft_model))
    if saved != present:
        odd = sorted(saved ^ present)
        raise OmniMemError(
            f"{adapter}: {len(odd)} adapter weights do not match {backbone.model_id}, for example {odd[0]}; "
            "use the adapter with the model it was trained on"
        )
    return peft_model

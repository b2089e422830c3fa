"""Merge a run's adapter into its full-precision base model and save a checkpoint that transformers loads.

    omnimem export runs/quickstart --out quickstart-merged

It runs on the CPU by default, with one copy of the model in host memory: the adapter is merged in place, the checkpoint
is written in shards, the model is freed, and the written checkpoint is loaded by transformers and verified (see
`train.merge`). The output folder gets its name only after that.
"""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

import torch

from omnimem.backbones import TINY, Backbone, load_backbone, parse_dtype
from omnimem.backbones.adapter import RECIPE_FILE, resolve_checkpoint
from omnimem.backbones.checkpoint import quiet_transformers, read_config
from omnimem.budget import PROFILE_FILE, BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.files import atomic_directory
from omnimem.recipe import Recipe, load_recipe
from omnimem.selection.heads_file import HEADS_FILE
from train.checkpoint import CHECKPOINTS_FOLDER as CHECKPOINTS
from train.merge import Verification, merge_adapter, verify
from train.model_card import model_card
from train.peak_memory import reset_peak

log = logging.getLogger("omnimem.train")

SHARD = "2GB"
"""Largest file of a checkpoint, and the most that is converted to the published layout at a time."""


def export_run(
    run: str | Path,
    out: str | Path,
    overwrite: bool = False,
    dtype: str | None = None,
    base: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Verification:
    """Write a merged checkpoint with processor, tokenizer, budget profile and model card.

    Parameters
    ----------
    run : str or Path
        Run directory (or any folder with an adapter and a budget profile).
    out : str or Path
        Folder to write; it appears when the checkpoint is verified.
    overwrite : bool
        Replace a folder that is not empty.
    dtype : str, optional
        Of the merged weights; by default that of the recipe, or of the base model for an adapter without a recipe.
    base : str or Path, optional
        Model to merge into; by default the one that the adapter names.
    device : device or str
        Where the model is loaded, merged and verified.

    Returns
    -------
    Verification
        Result of the comparison, and the peak host memory of the process since the start of the call. If weights are
        converted while they are loaded (to another `dtype`, or experts that are joined), it includes mapped pages of
        the files, which the kernel can drop.

    Raises
    ------
    OmniMemError
        No adapter or profile; a base that does not load; an output folder that contains the run or the base; a merged
        checkpoint that does not equal base + adapter.
    """
    reset_peak()
    run, out = Path(run), Path(out)
    named_base, adapter = resolve_checkpoint(run, None)
    base = named_base if base is None else base
    if adapter is None:
        raise OmniMemError(f"{run}: no adapter found; pass the output_dir of a finished run")
    _check_out(out, run, Path(base))
    recipe = _recipe_of(run)
    trained_dtype = _dtype_of(base) if recipe is None else parse_dtype(recipe.model.dtype)
    wanted = parse_dtype(dtype) if dtype else trained_dtype
    with atomic_directory(out, overwrite=overwrite) as folder:
        backbone = load_backbone(base, dtype=wanted, device=device)
        name, profile = backbone.name, _profile_of(Path(adapter), backbone)
        merged = merge_adapter(backbone, adapter)
        # With a device map, `save_pretrained` converts weights to the published layout shard by shard; without one it
        # converts all of them at once, which needs a second copy in memory.
        backbone.model.hf_device_map = {"": "cpu"}
        with quiet_transformers():
            backbone.model.save_pretrained(folder, max_shard_size=SHARD)
            backbone.processor.save_pretrained(folder)
        profile.save(folder / PROFILE_FILE)
        if (Path(adapter) / HEADS_FILE).is_file():
            shutil.copyfile(Path(adapter) / HEADS_FILE, folder / HEADS_FILE)
        del backbone
        written = load_backbone(folder, backbone=name, dtype=wanted, device=device)
        checked = verify(merged, written)
        quantized = recipe is not None and recipe.model.load_in_4bit
        card = model_card(run, base, written, profile, checked, quantized)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return checked


def _check_out(out: Path, run: Path, base: Path) -> None:
    """Refuse an output folder that would replace the run, its checkpoints or the base."""
    target = out.resolve()
    if run.resolve().is_relative_to(target):
        raise OmniMemError(f"--out {out} contains the run itself; choose another folder")
    for place in (base, run / CHECKPOINTS):
        if place.is_dir() and (target.is_relative_to(place.resolve()) or place.resolve().is_relative_to(target)):
            raise OmniMemError(f"--out {out} would replace {place}, which the export reads; choose another folder")


def _profile_of(adapter: Path, backbone: Backbone) -> BudgetProfile:
    """Budgets saved with an adapter; default budgets for an adapter that was not trained with OmniMem."""
    file = adapter / PROFILE_FILE
    if file.is_file() or (adapter / RECIPE_FILE).is_file():
        return BudgetProfile.load(file)
    log.warning("%s has no %s: the export gets a budget of 8192 tokens per layer", adapter, PROFILE_FILE)
    return BudgetProfile.uniform(backbone.config, ratio=5.0 if backbone.supports_audio else math.inf)


def _recipe_of(run: Path) -> Recipe | None:
    """The recipe that an adapter was trained with; None for an adapter without one."""
    file = run / RECIPE_FILE
    return load_recipe([f"recipe={file}"]) if file.is_file() else None


def _dtype_of(base: str | Path) -> torch.dtype | str:
    """The dtype in the configuration of a published model, under its newer or older key."""
    config = {} if str(base) == TINY else read_config(base)
    parts = (config, config.get("thinker_config") or {}, config.get("text_config") or {})
    names = [part.get("dtype") or part.get("torch_dtype") for part in parts]
    return next((parse_dtype(name) for name in names if name), "auto")

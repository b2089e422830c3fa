"""Merge a run's adapter into its full-precision base and save a checkpoint that transformers loads.

    omnimem export runs/quickstart --out quickstart-merged

It happens on the CPU unless told otherwise, and host memory holds the model once: base and adapter are merged in place
and written in shards, everything is freed, and the written checkpoint is loaded by transformers and verified (see
`train.merge`) before anything appears under the output's name.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch

from omnimem.backbones import TINY, Backbone, load_backbone, parse_dtype
from omnimem.backbones.adapter import RECIPE_FILE, resolve_checkpoint
from omnimem.backbones.checkpoint import quiet_transformers, read_config
from omnimem.budget import PROFILE_FILE, BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.files import atomic_directory
from omnimem.recipe import Recipe, load_recipe
from train.card import model_card
from train.checkpoint import FOLDER as CHECKPOINTS
from train.host_memory import reset_peak
from train.merge import Verification, merge_adapter, verify

log = logging.getLogger("omnimem.train")

SHARD = "2GB"
"""Largest file of a checkpoint, and most that is converted to the published layout at a time."""


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
        Folder to write; appears only when everything has been verified.
    overwrite : bool
        Replace a folder that is not empty.
    dtype : str, optional
        Of the merged weights; by default as trained, or as the base's configuration says for an adapter without recipe.
    base : str or Path, optional
        What the adapter is merged into; by default the model it names.
    device : device or str
        Where the model is loaded, merged and verified.

    Returns
    -------
    Verification
        What was compared, and the peak host memory of the process, counted from the start of the call. Where weights
        are converted while they are loaded (to another `dtype`, or experts that are joined), the mapped pages of the
        files count in addition to the model; the kernel can drop them.

    Raises
    ------
    OmniMemError
        No adapter or profile, a base that does not load, an output folder that holds what is read, or a merged
        checkpoint that does not equal base + adapter.
    """
    reset_peak()
    run, out = Path(run), Path(out)
    named, adapter = resolve_checkpoint(run, None)
    base = named if base is None else base
    if adapter is None:
        raise OmniMemError(f"{run}: no adapter here; give the output_dir of a finished run")
    _check_out(out, run, Path(base))
    recipe = _recipe_of(run)
    trained_dtype = _dtype_of(base) if recipe is None else parse_dtype(recipe.model.dtype)
    wanted = parse_dtype(dtype) if dtype else trained_dtype
    with atomic_directory(out, overwrite=overwrite) as folder:
        backbone = load_backbone(base, dtype=wanted, device=device)
        name, profile = backbone.name, _profile_of(Path(adapter), backbone)
        merged = merge_adapter(backbone, adapter)
        # As if offloaded: weights are converted to the published layout shard by shard, not all before the first one.
        backbone.model.hf_device_map = {"": "cpu"}
        with quiet_transformers():
            backbone.model.save_pretrained(folder, max_shard_size=SHARD)
            backbone.processor.save_pretrained(folder)
        profile.save(folder / PROFILE_FILE)
        del backbone
        written = load_backbone(folder, backbone=name, dtype=wanted, device=device)
        checked = verify(merged, written)
        # What an adapter is merged into is never quantised.
        quantized = recipe is not None and recipe.model.load_in_4bit
        card = model_card(run, base, written, profile, checked, quantized)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return checked


def _check_out(out: Path, run: Path, base: Path) -> None:
    """Refuse an output that would replace what is read."""
    target = out.resolve()
    if run.resolve().is_relative_to(target):
        raise OmniMemError(f"--out {out} holds the run itself; choose another folder")
    for place in (base, run / CHECKPOINTS):
        if place.is_dir() and (target.is_relative_to(place.resolve()) or place.resolve().is_relative_to(target)):
            raise OmniMemError(f"--out {out} would replace {place}, which is still needed; choose another folder")


def _profile_of(adapter: Path, backbone: Backbone) -> BudgetProfile:
    """Budgets saved with an adapter; one that was trained elsewhere has none and gets the default ones."""
    file = adapter / PROFILE_FILE
    if file.is_file() or (adapter / RECIPE_FILE).is_file():
        return BudgetProfile.load(file)
    log.warning("%s has no %s: the export gets 8192 positions a layer", adapter, PROFILE_FILE)
    return BudgetProfile.uniform(backbone.config, ratio=5.0 if backbone.supports_audio else math.inf)


def _recipe_of(run: Path) -> Recipe | None:
    """The recipe an adapter was trained with; a folder with an adapter alone has none."""
    file = run / RECIPE_FILE
    return load_recipe([f"recipe={file}"]) if file.is_file() else None


def _dtype_of(base: str | Path) -> torch.dtype | str:
    """The dtype that the configuration of a published model names, in its newer or older spelling."""
    config = {} if str(base) == TINY else read_config(base)
    parts = (config, config.get("thinker_config") or {}, config.get("text_config") or {})
    names = [part.get("dtype") or part.get("torch_dtype") for part in parts]
    return next((parse_dtype(name) for name in names if name), "auto")

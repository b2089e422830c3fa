"""Merge a run's adapter into its full-precision base and save what stock transformers loads.

    omnimem export runs/quickstart --out quickstart-merged

Before anything appears under the output's name, the merged checkpoint is loaded back from disk by the stock class: its
keys must be those of the base and its logits those of base + adapter (merged ≠ adapter is what users of other
toolkits ran into).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from omnimem.backbones import Backbone, load_backbone, parse_dtype
from omnimem.backbones.adapter import RECIPE_FILE, load_adapter, resolve_checkpoint, trained_whole
from omnimem.backbones.checkpoint import quiet_stock
from omnimem.budget import PROFILE_FILE, BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.files import atomic_directory
from train.card import model_card
from train.checkpoint import FOLDER as CHECKPOINTS
from train.config import Recipe, load_recipe

log = logging.getLogger("omnimem.train")

PROBE = "What is seen, what is heard, and what happened first? " * 4
"""Text whose logits are compared."""

WEIGHT_STEPS = 4
"""Allowed difference of a merged weight, in rounding steps of its dtype (the merge rounds two or three times)."""

LOGIT_STEPS, LOGIT_SHARE = 256, 0.1
"""Allowed difference of the logits: rounding steps at the largest one, and never more than this share of it."""


@dataclass(frozen=True)
class Verification:
    """What was compared before the export was published: tensors, largest logit difference, its limit."""

    keys: int
    difference: float
    limit: float

    def __str__(self) -> str:
        return (
            f"{self.keys} tensors verified against base + adapter, "
            f"logits within {self.difference:.1e} (limit {self.limit:.1e})"
        )


def export_run(
    run: str | Path,
    out: str | Path,
    overwrite: bool = False,
    dtype: str | None = None,
    base: str | Path | None = None,
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
        Of the merged weights; by default as trained.
    base : str or Path, optional
        What the adapter is merged into; by default the model it names.

    Raises
    ------
    OmniMemError
        No adapter or profile, a base that does not load, an output folder that holds what is read, or a merged
        checkpoint that does not equal base + adapter.
    """
    run, out = Path(run), Path(out)
    named, adapter = resolve_checkpoint(run, None)
    base = named if base is None else base
    if adapter is None:
        raise OmniMemError(f"{run}: no adapter here; give the output_dir of a finished run")
    _check_out(out, run, Path(base))
    recipe = _recipe_of(run)
    trained_dtype = "auto" if recipe is None else parse_dtype(recipe.model.dtype)
    wanted = parse_dtype(dtype) if dtype else trained_dtype
    # Never what an adapter is merged into.
    quantized = recipe is not None and recipe.model.quantize != "none"
    backbone = load_backbone(base, dtype=wanted)
    profile = _profile_of(Path(adapter), backbone)
    peft_model = load_adapter(backbone, adapter)
    expected = _probe_logits(backbone)
    deltas, replaced = _deltas(peft_model), _replaced(peft_model)
    try:
        with quiet_stock():
            backbone.model = peft_model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise OmniMemError(f"{adapter}: the adapter does not merge: {error}") from error
    with atomic_directory(out, overwrite=overwrite) as folder:
        with quiet_stock():
            backbone.model.save_pretrained(folder)
            backbone.processor.save_pretrained(folder)
        profile.save(folder / PROFILE_FILE)
        name, device = backbone.name, backbone.device
        del peft_model, backbone
        written = load_backbone(folder, backbone=name, dtype=wanted, device=device)
        fresh = load_backbone(base, backbone=name, dtype=wanted, device=device)
        _verify_weights(fresh, written, deltas, replaced)
        checked = _verify_logits(expected, written)
        (folder / "README.md").write_text(model_card(run, fresh, profile, checked, quantized), encoding="utf-8")
    return checked


def _check_out(out: Path, run: Path, base: Path) -> None:
    """Refuse an output that would replace what is read."""
    target = out.resolve()
    if run.resolve().is_relative_to(target):
        raise OmniMemError(f"--out {out} holds the run itself; choose another folder")
    for place in (base, run / CHECKPOINTS):
        if place.is_dir() and (target.is_relative_to(place.resolve()) or place.resolve().is_relative_to(target)):
            raise OmniMemError(f"--out {out} would replace {place}, which is still needed; choose another folder")


def _deltas(peft_model: Any) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, B and scaling of every adapted weight, by the name of the weight in the base."""
    prefix = "base_model.model."
    layers: list[tuple[str, Any]] = [(n, m) for n, m in peft_model.named_modules() if isinstance(m, LoraLayer)]
    return {
        f"{name.removeprefix(prefix)}.weight": (
            module.lora_A["default"].weight.detach().double(),
            module.lora_B["default"].weight.detach().double(),
            module.scaling["default"],
        )
        for name, module in layers
    }


def _replaced(peft_model: Any) -> dict[str, Tensor]:
    """Weights that were trained whole, by their name in the base."""
    return {
        f"{name.removeprefix('base_model.model.')}.{inner}": weight.detach().clone()
        for name, module in trained_whole(peft_model).items()
        for inner, weight in module.state_dict().items()
    }


def _verify_weights(
    base: Backbone, written: Backbone, deltas: dict[str, tuple[Tensor, Tensor, float]], replaced: dict[str, Tensor]
) -> None:
    """Every tensor on disk is the base's, or was trained whole, plus scaling·B·A where there is an adapter."""
    before, after = base.model.state_dict(), written.model.state_dict()
    if before.keys() != after.keys():
        raise OmniMemError(
            f"the merged checkpoint has other keys than the base: {sorted(before.keys() ^ after.keys())[:3]}"
        )
    for name, weight in before.items():
        if name not in deltas:
            expected = replaced.get(name)
            same = torch.equal(weight if expected is None else expected, after[name])
        else:
            a, b, scaling = deltas[name]
            expected = weight.double() + scaling * (b @ a)
            # What rounding can do to a sum grows with its terms, not with the result.
            step = torch.finfo(weight.dtype).eps * (weight.double().abs() + abs(scaling) * (b.abs() @ a.abs()))
            same = bool(((after[name].double() - expected).abs() <= WEIGHT_STEPS * step).all())
        if not same:
            raise OmniMemError(f"the merged checkpoint differs from base + adapter in {name}; nothing was written")


@torch.no_grad()
def _probe_logits(backbone: Backbone) -> Tensor:
    ids = backbone.question_ids(PROBE).to(backbone.device)
    return backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double().cpu()


def _verify_logits(expected: Tensor, written: Backbone) -> Verification:
    difference = (expected - _probe_logits(written)).abs().max().item()
    share = min(LOGIT_STEPS * torch.finfo(written.model.dtype).eps, LOGIT_SHARE)
    limit = share * max(1.0, expected.abs().max().item())
    if not difference <= limit:
        raise OmniMemError(
            f"the merged checkpoint differs from base + adapter: logits by {difference:.1e} (limit {limit:.1e}); "
            "nothing was written"
        )
    return Verification(len(written.model.state_dict()), difference, limit)


def _profile_of(adapter: Path, backbone: Backbone) -> BudgetProfile:
    """Budgets saved with an adapter; one that was trained elsewhere has none and gets the default ones."""
    file = adapter / PROFILE_FILE
    if file.is_file() or (adapter / RECIPE_FILE).is_file():
        return BudgetProfile.load(file)
    log.warning("%s has no %s: the export gets 8192 positions a layer", adapter, PROFILE_FILE)
    return BudgetProfile.uniform(backbone.config, ratio=5.0 if backbone.hears else math.inf)


def _recipe_of(run: Path) -> Recipe | None:
    """The recipe an adapter was trained with; a folder with an adapter alone has none."""
    file = run / RECIPE_FILE
    return load_recipe([f"recipe={file}"]) if file.is_file() else None

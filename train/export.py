"""Merge a run's adapter into its full-precision base and save what stock transformers loads.

    omnimem export runs/quickstart --out quickstart-merged

Before anything appears under the output's name, the merged checkpoint is loaded back from disk by the stock class: its
keys must be those of the base and its logits those of base + adapter (merged ≠ adapter is what users of other
toolkits ran into).
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from omnimem.backbones import Backbone, load_backbone, parse_dtype
from omnimem.backbones.checkpoint import quiet_stock
from omnimem.budget import BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.files import atomic_directory
from omnimem.stream import PROFILE_FILE, load_adapter, resolve_checkpoint
from train.card import model_card

log = logging.getLogger("omnimem.export")

PROBE = "What is seen, what is heard, and what happened first? " * 4
"""Text whose logits are compared."""

ROUNDING_STEPS = 32
"""Allowed difference in units of the dtype's rounding step at the largest logit."""


@dataclass(frozen=True)
class Verification:
    """What was compared before the export was published: keys, largest logit difference, its limit."""

    keys: int
    difference: float
    limit: float


def export_run(run: str | Path, out: str | Path, overwrite: bool = False, dtype: str | None = None) -> Verification:
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

    Raises
    ------
    OmniMemError
        No adapter or profile, a base that does not load, an output folder that holds the run, or a merged
        checkpoint that does not equal base + adapter.
    """
    run, out = Path(run), Path(out)
    base, adapter = resolve_checkpoint(run, None)
    if adapter is None:
        raise OmniMemError(f"{run}: no adapter here; give the output_dir of a finished run")
    if run.resolve().is_relative_to(out.resolve()):
        raise OmniMemError(f"--out {out} holds the run itself; choose another folder")
    profile = BudgetProfile.load(Path(adapter) / PROFILE_FILE)
    backbone = load_backbone(base, dtype=parse_dtype(dtype) if dtype else _trained_dtype(run))
    keys = set(backbone.model.state_dict())
    peft_model = load_adapter(backbone, adapter)
    expected = _probe_logits(backbone)
    backbone.model = peft_model.merge_and_unload(safe_merge=True)
    merged_keys = set(backbone.model.state_dict())
    if merged_keys != keys:
        raise OmniMemError(f"merging changed the keys of the checkpoint: {sorted(keys ^ merged_keys)[:3]}")
    with atomic_directory(out, overwrite=overwrite) as folder:
        with quiet_stock():
            backbone.model.save_pretrained(folder)
        backbone.processor.save_pretrained(folder)
        profile.save(folder / PROFILE_FILE)
        written = load_backbone(folder, backbone=backbone.name, dtype=backbone.model.dtype, device=backbone.device)
        checked = _verify(expected, _probe_logits(written), len(keys), backbone.model.dtype)
        (folder / "README.md").write_text(model_card(run, backbone, profile, checked), encoding="utf-8")
        shutil.copy(Path(adapter) / "adapter_config.json", folder / "merged_adapter_config.json")
    log.info(
        "%s: %d tensors, logits within %.1e of base + adapter (limit %.1e)",
        out, checked.keys, checked.difference, checked.limit,
    )  # fmt: skip
    return checked


@torch.no_grad()
def _probe_logits(backbone: Backbone) -> Tensor:
    ids = backbone.question_ids(PROBE).to(backbone.device)
    return backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double().cpu()


def _verify(expected: Tensor, actual: Tensor, keys: int, dtype: torch.dtype) -> Verification:
    difference = (expected - actual).abs().max().item()
    limit = ROUNDING_STEPS * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
    if not difference <= limit:
        raise OmniMemError(
            f"the merged checkpoint's logits differ from base + adapter by {difference:.1e} (limit {limit:.1e}); "
            "nothing was written"
        )
    return Verification(keys, difference, limit)


def _trained_dtype(run: Path) -> torch.dtype | str:
    """Weights as the run's recipe has them; the machine's default when there is no recipe."""
    from train.config import load_recipe
    from train.rundir import RECIPE_FILE

    if not (run / RECIPE_FILE).is_file():
        return "auto"
    return parse_dtype(load_recipe([f"recipe={run / RECIPE_FILE}"]).model.dtype)

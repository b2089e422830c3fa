"""A run's folder: recognised, and never mixed with the run of another recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.manifest import Row, manifest_fingerprint
from omnimem.backbones.adapter import ADAPTER_CONFIG, RECIPE_FILE
from omnimem.errors import OmniMemError
from omnimem.files import atomic_write_json, remove_directory
from omnimem.recipe import Recipe, load_recipe, to_dict
from train.checkpoint import checkpoints

DATA_FILE = "data.json"

MAY_CHANGE = (
    "recipe", "resume_from_checkpoint", "dry_run", "output_dir", "finish", "train.max_steps", "train.num_train_epochs",
    "train.logging_steps",
    "eval", "train.save_steps", "train.save_total_limit", "data.path", "data.root", "data.prefetch_chunks",
    "train.offload", "train.report_to", "distill.cache_dir",
)  # fmt: skip
"""Keys that do not change what an earlier step did; the data itself is compared by its fingerprint."""


def prepare_run_directory(output_dir: Path, recipe: Recipe, rows: list[Row]) -> None:
    """Check that what is in the folder, if anything, is an earlier part of this very run.

    Raises
    ------
    OmniMemError
        The folder holds a run and `resume_from_checkpoint` is false, or the run of another recipe or other data.
    """
    saved_recipe = output_dir / RECIPE_FILE
    fingerprint = {"fingerprint": manifest_fingerprint(rows), "rows": len(rows)}
    # A run that never saved anything has nothing to protect: it simply begins again.
    if saved_recipe.is_file() and (checkpoints(output_dir) or (output_dir / ADAPTER_CONFIG).is_file()):
        if not recipe.resume_from_checkpoint:
            raise OmniMemError(
                f"{output_dir} already holds a run; give another output_dir, or resume_from_checkpoint=true to continue"
            )
        before = _flat(to_dict(load_recipe([f"recipe={saved_recipe}"])))
        for key, value in _flat(to_dict(recipe)).items():
            if not key.startswith(MAY_CHANGE) and before[key] != value:
                raise OmniMemError(
                    f"{output_dir} holds a run with {key}={before[key]!r}, not {value!r}; "
                    "give another output_dir or the same value"
                )
        data = output_dir / DATA_FILE
        if data.is_file() and fingerprint["fingerprint"] not in data.read_text(encoding="utf-8"):
            raise OmniMemError(f"{output_dir} holds a run on other data; give another output_dir or the same data")
    else:
        for folder in output_dir.glob("best*"):
            remove_directory(folder)  # of a run that was never saved, and would count in this one
    atomic_write_json(output_dir / DATA_FILE, fingerprint)


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

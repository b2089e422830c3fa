"""The output folder of a run: it must be empty or hold an earlier part of the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.manifest import Row, manifest_fingerprint
from omnimem.backbones.adapter import ADAPTER_CONFIG, RECIPE_FILE
from omnimem.errors import OmniMemError
from omnimem.files import atomic_write_json, remove_directory
from omnimem.recipe import Recipe, load_recipe, to_dict
from omnimem.recipe.messages import show_value
from omnimem.selection.heads_file import HEADS_FILE
from train.checkpoint import checkpoints

DATA_FILE = "data.json"

MAY_CHANGE = (
    "recipe", "resume_from_checkpoint", "dry_run", "output_dir", "finish", "train.max_steps", "train.num_train_epochs",
    "train.logging_steps", "train.save_steps", "train.save_total_limit", "train.offload", "train.report_to",
    "train.ddp_timeout", "eval", "data.path", "data.root", "data.prefetch_chunks", "distill.cache_dir",
)  # fmt: skip
"""Keys that a resumed run may change; a new number of steps changes the schedules after resuming.

data.path and data.root may change because the data are compared by fingerprint.
"""


def prepare_run_directory(output_dir: Path, recipe: Recipe, rows: list[Row]) -> None:
    """Check that the folder is empty or holds an earlier part of the same run, and write the data's fingerprint.

    Raises
    ------
    OmniMemError
        The folder holds a run and `resume_from_checkpoint` is false, or the run of another recipe or other data.
    """
    saved_recipe = output_dir / RECIPE_FILE
    fingerprint = {"fingerprint": manifest_fingerprint(rows), "rows": len(rows)}
    # A run that saved nothing starts again.
    if saved_recipe.is_file() and (
        checkpoints(output_dir) or any((output_dir / name).is_file() for name in (ADAPTER_CONFIG, HEADS_FILE))
    ):
        if not recipe.resume_from_checkpoint:
            raise OmniMemError(
                f"{output_dir} already holds a run; use another output_dir, or "
                "resume_from_checkpoint=true to continue it"
            )
        before = _flat(to_dict(load_recipe([f"recipe={saved_recipe}"])))
        for key, value in _flat(to_dict(recipe)).items():
            if not key.startswith(MAY_CHANGE) and before[key] != value:
                raise OmniMemError(
                    f"{output_dir} holds a run with {key}={show_value(before[key])}, not {show_value(value)}; "
                    "use another output_dir or the same value"
                )
        data = output_dir / DATA_FILE
        if data.is_file() and fingerprint["fingerprint"] not in data.read_text(encoding="utf-8"):
            raise OmniMemError(f"{output_dir} holds a run on other data; use another output_dir or the same data")
    else:
        for folder in output_dir.glob("best*"):
            remove_directory(folder)  # of a run without a checkpoint; keep_best would rank them
    atomic_write_json(output_dir / DATA_FILE, fingerprint)


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

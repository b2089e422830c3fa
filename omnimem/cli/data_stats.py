"""`omnimem data stats`: plan the streams of a manifest under a recipe, count and print.

    omnimem data stats train.jsonl --recipe qwen2_5_omni_lora data.fps=2 memory.mean_budget=4096

The plan is that of ``dry_run=true``: computed from file headers and the model's shapes, without decoding or weights.
This module is part of the command line because it joins `data_prep` with `train`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import track

from data_prep.manifest import rejected_answers
from data_prep.stats import bytes_per_token, count, print_stats, tokens_per_hour
from omnimem.files import atomic_write_json
from train.config import FinishConfig, load_recipe
from train.data import load_rows
from train.plan import RETAINED, WAITING, memory_plan, plan_stream
from train.setup import check_recipe, selection_of, settings_of


def stats_command(args: argparse.Namespace) -> None:
    """Compute, print, and write ``--json``; see `stats` for the arguments."""
    recipe, *overrides = args.recipe
    found = stats(args.manifest, args.root, recipe, [*overrides, *args.overrides])
    if args.json is not None:
        atomic_write_json(args.json, found)
    print_stats(found, Console())


def stats(
    manifest: str, root: str | os.PathLike[str] | None = None, recipe: str = "quickstart", overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Count the tokens of a manifest's streams and their memory under a recipe.

    Parameters
    ----------
    manifest : str
        As for `read_manifest`, or a prepared folder; bad rows and files that cannot be opened are skipped and counted.
    root : path, optional
        The data root.
    recipe : str
        Name or path of the recipe: model, data, budgets, training.
    overrides : sequence of str
        ``key=value`` overrides of the recipe, as for training.

    Returns
    -------
    dict
        JSON only: ``rows``, ``hours``, ``tokens`` (total, per hour, ratio), ``chunks``, ``durations``, ``memory`` in
        bytes.

    Raises
    ------
    OmniMemError
        A mistake in the recipe or an override, a missing model, no usable row.
    """
    where = [f"data.path={manifest}", *([] if root is None else [f"data.root={root}"])]
    config = load_recipe([f"recipe={recipe}", *overrides, *where])
    config.finish = FinishConfig()  # its clip belongs to the recipe's own data
    config.dry_run = True  # shapes are enough
    config.data.on_bad_row = "skip"
    backbone, profile = check_recipe(config)
    read = load_rows(config.data, backbone.supports_audio)
    console = Console(stderr=True)
    rows = track(read.rows, "planning", console=console, disable=not console.is_terminal, transient=True)
    streams = [plan_stream(row, backbone, settings_of(config)) for row in rows]
    per_token = bytes_per_token(backbone)  # before memory_plan adds an adapter
    parts = memory_plan(config, backbone, profile, selection_of(config), streams)
    on_device = [size for name, size in parts.items() if WAITING not in name or config.train.offload == "none"]
    return {
        "manifest": str(manifest),
        "recipe": recipe,
        "model": config.model.name_or_path,
        "fps": config.data.fps,
        "chunk_seconds": config.data.chunk_seconds,
        "mean_budget": profile.mean_budget,
        "rows": {
            "used": len(streams),
            "skipped": read.problems,
            "questions": sum(s.questions for s in streams),
            "rejected": rejected_answers(read.rows),
        },
        **count(streams, profile.mean_budget),
        "memory": {
            "per_token": per_token,
            "full_cache_per_hour": round(tokens_per_hour(sum(s.tokens for s in streams), streams) * per_token),
            "full_cache_of_longest": max(s.tokens for s in streams) * per_token,
            "retained": parts[RETAINED] // config.train.per_device_train_batch_size,
            "training_step": sum(on_device),
            "training_step_parts": parts,
        },
    }

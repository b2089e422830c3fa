"""`omnimem data stats`: hours, tokens by modality and memory of a manifest under a recipe.

    omnimem data stats train.jsonl --recipe qwen2_5_omni_lora data.fps=2 memory.mean_budget=4096

Computed from file headers and the model's shapes, as in `dry_run=true`: nothing is decoded, no weights are loaded.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_prep.manifest import rejected_answers
from omnimem.backbones import Backbone
from omnimem.budget import ModelFingerprint
from omnimem.files import atomic_write_json
from omnimem.recipe import FinishConfig, load_recipe
from train.data import load_rows
from train.memory_plan import RETAINED_PART, device_bytes, memory_plan
from train.setup import check_recipe, selection_method, stream_settings
from train.stream_plan import StreamPlan, plan_stream

HOUR = 3600.0

DURATIONS = (
    (10, "under 10 s"),
    (30, "10 to 30 s"),
    (60, "30 to 60 s"),
    (180, "1 to 3 min"),
    (600, "3 to 10 min"),
    (1800, "10 to 30 min"),
    (3600, "30 to 60 min"),
    (10800, "1 to 3 h"),
    (float("inf"), "3 h and more"),
)
"""Upper limits of the bins in seconds, and their names."""

BAR = 40  # characters of the longest bar


def run_stats(args: argparse.Namespace) -> None:
    """Compute and print the statistics; write them to ``--json``."""
    recipe, *overrides = args.recipe
    found = stats(args.manifest, args.root, recipe, [*overrides, *args.overrides])
    if args.json is not None:
        atomic_write_json(args.json, found)
    print_stats(found, Console())


def stats(
    manifest: str, root: str | os.PathLike[str] | None = None, recipe: str = "quickstart", overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Statistics of a manifest under a recipe.

    Parameters
    ----------
    manifest : str
        Manifest or prepared folder; bad rows and files that cannot be opened are skipped and counted.
    root : path, optional
        Folder of its media.
    recipe : str
        Name or path; gives the model, how media are read, the budgets and the training settings.
    overrides : sequence of str
        ``key=value`` arguments, as for training.

    Returns
    -------
    dict
        For JSON: ``rows``, ``hours``, ``tokens`` (total, per hour, ratio), ``chunks``, ``durations``, ``memory`` in
        bytes.

    Raises
    ------
    OmniMemError
        An invalid recipe or override, a missing model, no usable row.
    """
    where = [f"data.path={manifest}", *([] if root is None else [f"data.root={root}"])]
    loaded = load_recipe([f"recipe={recipe}", *overrides, *where])
    # `check_recipe` would look for the recipe's `finish.media` in the media folder of this manifest.
    loaded.finish = FinishConfig()
    loaded.dry_run = True  # shapes are enough
    loaded.data.on_bad_row = "skip"
    backbone, profile = check_recipe(loaded)
    manifest_rows = load_rows(loaded.data, backbone.supports_audio)
    console = Console(stderr=True)
    rows = track(manifest_rows.rows, "planning", console=console, disable=not console.is_terminal, transient=True)
    streams = [plan_stream(row, backbone, stream_settings(loaded)) for row in rows]
    token_bytes = bytes_per_token(backbone)
    parts = memory_plan(loaded, backbone, profile, selection_method(loaded), streams)
    return {
        "manifest": str(manifest),
        "recipe": recipe,
        "model": loaded.model.name_or_path,
        "fps": loaded.data.fps,
        "chunk_seconds": loaded.data.chunk_seconds,
        "mean_budget": profile.mean_budget,
        "rows": {
            "used": len(streams),
            "skipped": manifest_rows.problems,
            "questions": sum(s.questions for s in streams),
            "rejected": rejected_answers(manifest_rows.rows),
        },
        **count(streams, profile.mean_budget),
        "memory": {
            "per_token": token_bytes,
            "full_cache_per_hour": round(_per_hour(sum(s.tokens for s in streams), streams) * token_bytes),
            "full_cache_of_longest": max(s.tokens for s in streams) * token_bytes,
            "retained": parts[RETAINED_PART] // loaded.train.per_device_train_batch_size,
            "training_step": device_bytes(loaded, parts),
            "training_step_parts": parts,
        },
    }


def bytes_per_token(backbone: Backbone) -> int:
    """Bytes of the keys and values of a token in all layers, in the model's dtype."""
    shape = ModelFingerprint.of(backbone.config)
    return shape.layers * 2 * shape.kv_heads * shape.head_dim * backbone.model.dtype.itemsize


def count(streams: Sequence[StreamPlan], mean_budget: float) -> dict[str, Any]:
    """Hours, tokens, chunks and durations of planned streams; ratios without a denominator are None."""
    visual, audio = sum(s.visual for s in streams), sum(s.audio for s in streams)
    chunks = sum(s.chunks for s in streams)
    seconds = [s.seconds for s in streams]
    return {
        "hours": round(sum(seconds) / HOUR, 4),
        "without_duration": seconds.count(0.0),
        "tokens": {
            "visual": visual,
            "audio": audio,
            "total": visual + audio,
            "visual_per_hour": round(_per_hour(visual, streams)),
            "audio_per_hour": round(_per_hour(audio, streams)),
            "visual_to_audio": round(visual / audio, 3) if audio else None,
            "longest_stream": max((s.tokens for s in streams), default=0),
            "streams_over_budget": sum(s.tokens > mean_budget for s in streams),
        },
        "chunks": {
            "total": chunks,
            "mean_tokens": round((visual + audio) / chunks, 1) if chunks else None,
            "largest_tokens": max((s.largest_chunk for s in streams), default=0),
            "most_in_a_stream": max((s.chunks for s in streams), default=0),
        },
        "durations": durations(seconds),
    }


def _per_hour(tokens: int, streams: Sequence[StreamPlan]) -> float:
    """Tokens per hour of media; 0 if no header has a duration."""
    seconds = sum(s.seconds for s in streams)
    return tokens / seconds * HOUR if seconds else 0.0


def durations(seconds: Sequence[float]) -> dict[str, int]:
    """Number of streams in each bin, from the first to the last bin that is not empty."""
    bins = Counter(next(name for limit, name in DURATIONS if one < limit) for one in seconds)
    used = [at for at, (_, name) in enumerate(DURATIONS) if bins[name]]
    return {name: bins[name] for _, name in DURATIONS[min(used, default=0) : max(used, default=-1) + 1]}


def print_stats(found: dict[str, Any], console: Console) -> None:
    """Print the numbers as a table, then the parts of a training step and the durations."""
    rows, tokens, chunks, memory = found["rows"], found["tokens"], found["chunks"], found["memory"]
    left = f", {len(rows['skipped'])} rows skipped" if rows["skipped"] else ""
    console.print(f"{rows['used']} streams, {rows['questions']} questions, {found['hours']:,.2f} hours{left}")
    if rows["rejected"]:
        console.print(f"{rows['rejected']} rejected answers, which training ignores")
    if found["without_duration"]:
        console.print(f"{found['without_duration']} streams count as 0 s: their headers have no duration")
    reading = f"{found['fps']:g} frames/s, chunks of {found['chunk_seconds']:g} s, model {found['model']}"
    ratio = tokens["visual_to_audio"]
    _print_table(
        console,
        reading,
        {
            "visual tokens per hour": f"{tokens['visual_per_hour']:,}",
            "audio tokens per hour": f"{tokens['audio_per_hour']:,}",
            "visual to audio": "no audio" if ratio is None else f"{ratio:g} : 1",
            "tokens of all streams": f"{tokens['total']:,}",
            "tokens of the longest stream": f"{tokens['longest_stream']:,}",
            "tokens per chunk, mean": "–" if chunks["mean_tokens"] is None else f"{chunks['mean_tokens']:,.0f}",
            "tokens of the largest chunk": f"{chunks['largest_tokens']:,}",
            f"streams longer than the budget of {found['mean_budget']:g}": f"{tokens['streams_over_budget']}",
            "full cache, per hour of media": _size(memory["full_cache_per_hour"]),
            "full cache, longest stream": _size(memory["full_cache_of_longest"]),
            "compressed cache, any length": _size(memory["retained"]),
        },
    )
    parts = {name: _size(size) for name, size in memory["training_step_parts"].items()}
    title = "memory of a training step on the longest stream, computed from shapes"
    _print_table(console, title, {**parts, "sum on the device": _size(memory["training_step"])})
    most = max(found["durations"].values())
    bars = {name: f"{n} {'█' * max(bool(n), round(BAR * n / most))}" for name, n in found["durations"].items()}
    _print_table(console, "durations", bars, justify="left")


def _print_table(console: Console, title: str, cells: dict[str, str], justify: Any = "right") -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify=justify)
    for name, value in cells.items():
        table.add_row(name, value)
    console.print(table)


def _size(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB" if size < 10 * 2**30 else f"{size / 2**30:,.1f} GiB"

"""`omnimem data stats`: what a manifest becomes in a model: hours, tokens by modality, memory and budget.

    omnimem data stats train.jsonl --recipe qwen2_5_omni_lora data.fps=2 memory.mean_budget=4096

Computed from headers and from the model's shapes, by the same plan as `dry_run=true`: nothing is decoded, no weight
is loaded. A position is what one token takes in the cache; picture and sound have one each per token.
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
from train.plan import RETAINED, WAITING, StreamPlan, memory_plan, plan_stream
from train.setup import check_recipe, selection_of, settings_of

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
"""Upper limits in seconds, and what the bins are called."""

BAR = 40  # characters of the longest bar


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
    """Count what the streams of a manifest become under a recipe.

    Parameters
    ----------
    manifest : str
        As `read_manifest` takes it, or a prepared folder; bad rows and files that cannot be opened are left out and
        counted.
    root : path, optional
        Of its media.
    recipe : str
        Name or path: model, reading, budgets, training.
    overrides : sequence of str
        ``key=value`` on top of the recipe, as for training.

    Returns
    -------
    dict
        JSON only: ``rows``, ``hours``, ``tokens`` (total, an hour, ratio), ``chunks``, ``durations``, ``memory`` in
        bytes.

    Raises
    ------
    OmniMemError
        A mistake in the recipe or an override, a model that is not there, no row that can be used.
    """
    where = [f"data.path={manifest}", *([] if root is None else [f"data.root={root}"])]
    settled = load_recipe([f"recipe={recipe}", *overrides, *where])
    settled.finish = FinishConfig()  # its clip belongs to the recipe's own data
    settled.dry_run = True  # shapes are enough
    settled.data.on_bad_row = "skip"
    backbone, profile = check_recipe(settled)
    read = load_rows(settled.data, backbone.supports_audio)
    console = Console(stderr=True)
    rows = track(read.rows, "planning", console=console, disable=not console.is_terminal, transient=True)
    streams = [plan_stream(row, backbone, settings_of(settled)) for row in rows]
    position = bytes_per_position(backbone)  # before the adapter is added below
    parts = memory_plan(settled, backbone, profile, selection_of(settled), streams)
    on_device = [size for name, size in parts.items() if WAITING not in name or settled.train.offload == "none"]
    return {
        "manifest": str(manifest),
        "recipe": recipe,
        "model": settled.model.name_or_path,
        "fps": settled.data.fps,
        "chunk_seconds": settled.data.chunk_seconds,
        "mean_budget": profile.mean_budget,
        "rows": {
            "used": len(streams),
            "left_out": read.problems,
            "questions": sum(s.questions for s in streams),
            "rejected": rejected_answers(read.rows),
        },
        **count(streams, profile.mean_budget),
        "memory": {
            "per_token": position,
            "full_cache_per_hour": round(_per_hour(sum(s.tokens for s in streams), streams) * position),
            "full_cache_of_longest": max(s.tokens for s in streams) * position,
            "retained": parts[RETAINED] // settled.train.per_device_train_batch_size,
            "training_step": sum(on_device),
            "training_step_parts": parts,
        },
    }


def bytes_per_position(backbone: Backbone) -> int:
    """Bytes of the keys and values of one position in all layers, in the model's dtype."""
    shape = ModelFingerprint.of(backbone.config)
    return shape.layers * 2 * shape.kv_heads * shape.head_dim * backbone.model.dtype.itemsize


def count(streams: Sequence[StreamPlan], mean_budget: float) -> dict[str, Any]:
    """Hours, tokens, chunks and durations of planned streams; rates and ratio are None where they would divide by 0."""
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
    """Tokens per hour of media; 0 where no header says how long anything is."""
    seconds = sum(s.seconds for s in streams)
    return tokens / seconds * HOUR if seconds else 0.0


def durations(seconds: Sequence[float]) -> dict[str, int]:
    """How many streams lie in each bin, from the first bin to the last that is not empty."""
    bins = Counter(next(name for limit, name in DURATIONS if one < limit) for one in seconds)
    used = [at for at, (_, name) in enumerate(DURATIONS) if bins[name]]
    return {name: bins[name] for _, name in DURATIONS[min(used, default=0) : max(used, default=-1) + 1]}


def print_stats(found: dict[str, Any], console: Console) -> None:
    """Print the numbers as a table, then the parts of a training step and the durations."""
    rows, tokens, chunks, memory = found["rows"], found["tokens"], found["chunks"], found["memory"]
    left = f", {len(rows['left_out'])} rows left out" if rows["left_out"] else ""
    console.print(f"{rows['used']} streams, {rows['questions']} questions, {found['hours']:,.2f} hours{left}")
    if rows["rejected"]:
        console.print(f"{rows['rejected']} rejected answers, which nothing trains on")
    if found["without_duration"]:
        console.print(f"{found['without_duration']} streams count as 0 s: their headers do not say how long they are")
    reading = f"{found['fps']:g} frames/s, chunks of {found['chunk_seconds']:g} s, model {found['model']}"
    ratio = tokens["visual_to_audio"]
    _print_table(
        console,
        reading,
        {
            "visual tokens an hour": f"{tokens['visual_per_hour']:,}",
            "audio tokens an hour": f"{tokens['audio_per_hour']:,}",
            "visual to audio": "no audio" if ratio is None else f"{ratio:g} : 1",
            "tokens of all streams": f"{tokens['total']:,}",
            "tokens of the longest stream": f"{tokens['longest_stream']:,}",
            "tokens of a chunk, mean": "–" if chunks["mean_tokens"] is None else f"{chunks['mean_tokens']:,.0f}",
            "tokens of the largest chunk": f"{chunks['largest_tokens']:,}",
            f"streams longer than the budget of {found['mean_budget']:g}": f"{tokens['streams_over_budget']}",
            "full cache, an hour of media": _size(memory["full_cache_per_hour"]),
            "full cache, longest stream": _size(memory["full_cache_of_longest"]),
            "retained memory, any length": _size(memory["retained"]),
        },
    )
    parts = {name: _size(size) for name, size in memory["training_step_parts"].items()}
    title = "a training step on the longest stream, from shapes"
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

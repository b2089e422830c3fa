"""``dry_run=true``: print the streams, steps and memory of a run, computed without loading weights.

accelerate launch train.py recipe=quickstart dry_run=true
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from data_prep.manifest import Row
from omnimem.backbones import Backbone
from omnimem.budget import BudgetProfile
from omnimem.memory.token_bytes import TokenBytes, peak_bytes, resident_bytes, token_bytes_of
from omnimem.recipe import Recipe
from train.memory_plan import device_bytes, memory_plan
from train.samples import Samples
from train.schedule import Schedule
from train.setup import selection_method, stream_settings
from train.stream_plan import StreamPlan, plan_stream

MAX_STREAMS_SHOWN = 20
"""Rows in the table of streams; of more streams, the longest are shown."""


def print_plan(recipe: Recipe, rows: list[Row], backbone: Backbone, profile: BudgetProfile, processes: int = 1) -> None:
    """Print streams, steps and memory; `backbone` has shapes only (``meta`` device)."""
    console = Console()
    streams = [plan_stream(row, backbone, stream_settings(recipe)) for row in rows]
    console.print(_streams_table(recipe, streams))
    schedule = Schedule(Samples(rows, backbone), recipe.train, recipe.data.shuffle, processes)
    epochs = schedule.epoch(schedule.steps)
    console.print(
        f"{schedule.steps} optimizer steps of {schedule.samples_per_step} stream(s), {epochs:.2f} epochs, about "
        f"{epochs * sum(stream.tokens for stream in streams):,.0f} tokens"
    )
    console.print(
        f"cache of {profile.mean_budget:g} tokens per layer ({profile.source}), selection {recipe.selection.method}"
    )
    method = selection_method(recipe)
    token = token_bytes_of(backbone, method, recipe.memory.kv_dtype)
    if not method.keeps_everything:
        console.print(_cache_table(profile, token, max(streams, key=lambda stream: stream.largest_chunk)))
    parts = memory_plan(recipe, backbone, profile, method, streams)
    console.print(_memory_table(recipe, parts))


def _streams_table(recipe: Recipe, streams: list[StreamPlan]) -> Table:
    table = Table(title=f"{len(streams)} streams ({recipe.data.path})", title_justify="left")
    for column in ("stream", "seconds", "chunks", "visual", "audio", "largest chunk", "questions"):
        table.add_column(column, justify="left" if column == "stream" else "right")
    if len(streams) > MAX_STREAMS_SHOWN:
        streams = sorted(streams, key=lambda stream: -stream.tokens)[:MAX_STREAMS_SHOWN]
    for stream in streams:
        counts = (stream.chunks, stream.visual, stream.audio, stream.largest_chunk, stream.questions)
        table.add_row(stream.name, f"{stream.seconds:.1f}", *map(str, counts))
    return table


def _cache_table(profile: BudgetProfile, token: TokenBytes, largest: StreamPlan) -> Table:
    """Bytes of the cache of one stream, part by part; text tokens, which are never evicted, are not counted."""
    layers, tokens = len(profile.layers), sum(layer.total for layer in profile.layers)
    title = f"cache of one stream without its text, which adds {layers * token.total:,} bytes per text token"
    table = Table(title=title, title_justify="left")
    for column in ("part", "bytes per token and layer", "MiB"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, size in token.parts().items():
        table.add_row(name, f"{size:,}", f"{tokens * size / 2**20:,.3f}")
    table.add_row(
        "resident: every layer at its budget", f"{token.total:,}", f"{resident_bytes(profile, token) / 2**20:,.3f}"
    )
    peak = peak_bytes(profile, token, largest.largest_chunk)
    table.add_row(f"peak: and a chunk of {largest.largest_chunk} tokens", "", f"{peak / 2**20:,.3f}")
    return table


def _memory_table(recipe: Recipe, parts: dict[str, int]) -> Table:
    title = "tensors of a training step, computed from shapes (without libraries and decoding)"
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("MiB", justify="right")
    for name, size in {**parts, "sum on the device": device_bytes(recipe, parts)}.items():
        table.add_row(name, f"{size / 2**20:,.1f}")
    return table

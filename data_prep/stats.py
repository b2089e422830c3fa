"""Counts of planned streams: hours, tokens by modality, chunks, durations; and how `omnimem data stats` prints them.

Visual and audio tokens occupy one cache entry each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from omnimem.backbones import Backbone
from omnimem.budget import ModelFingerprint

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
"""Upper limit in seconds and name of each bin."""

BAR = 40  # characters of the longest bar


class StreamCounts(Protocol):
    """Length and token counts of one stream, computed from its header (`train.plan.StreamPlan`)."""

    @property
    def seconds(self) -> float:
        """Length of the stream."""
        ...

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        ...

    @property
    def visual(self) -> int:
        """Visual tokens."""
        ...

    @property
    def audio(self) -> int:
        """Audio tokens."""
        ...

    @property
    def tokens(self) -> int:
        """Visual and audio tokens."""
        ...

    @property
    def largest_chunk(self) -> int:
        """Tokens of the largest chunk."""
        ...


def bytes_per_token(backbone: Backbone) -> int:
    """Bytes of the keys and values of one token in all layers, in the model's dtype."""
    shape = ModelFingerprint.of(backbone.config)
    return shape.layers * 2 * shape.kv_heads * shape.head_dim * backbone.model.dtype.itemsize


def count(streams: Sequence[StreamCounts], mean_budget: float) -> dict[str, Any]:
    """Hours, tokens, chunks and durations of planned streams; a mean or ratio that would divide by 0 is None."""
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
            "visual_per_hour": round(tokens_per_hour(visual, streams)),
            "audio_per_hour": round(tokens_per_hour(audio, streams)),
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


def tokens_per_hour(tokens: int, streams: Sequence[StreamCounts]) -> float:
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
    skipped = f", {len(rows['skipped'])} rows skipped" if rows["skipped"] else ""
    console.print(f"{rows['used']} streams, {rows['questions']} questions, {found['hours']:,.2f} hours{skipped}")
    if rows["rejected"]:
        console.print(f"{rows['rejected']} rejected answers, which nothing trains on")
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
            "visual tokens per audio token": "no audio" if ratio is None else f"{ratio:g}",
            "tokens of all streams": f"{tokens['total']:,}",
            "tokens of the longest stream": f"{tokens['longest_stream']:,}",
            "mean tokens per chunk": "–" if chunks["mean_tokens"] is None else f"{chunks['mean_tokens']:,.0f}",
            "tokens of the largest chunk": f"{chunks['largest_tokens']:,}",
            f"streams longer than the budget of {found['mean_budget']:g}": f"{tokens['streams_over_budget']}",
            "full cache, per hour of media": _size(memory["full_cache_per_hour"]),
            "full cache, longest stream": _size(memory["full_cache_of_longest"]),
            "bounded cache, any length": _size(memory["retained"]),
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

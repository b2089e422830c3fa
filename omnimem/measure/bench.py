"""The command ``omnimem bench``: memory and first-token latency by stream length (arXiv 2606.07577, figure 4).

    omnimem bench --model tiny --out bench --device cpu

A clip is repeated to each length and streamed with each method; a question is asked at the end. On CUDA, the peak
memory of a cell is the most that PyTorch allocated beyond the weights. On the CPU, each cell runs in its own process,
and the table reports the increase of the peak resident set over a stream of one chunk (which loads everything that is
loaded once). For a small model this is mostly noise, so the figure shows the exact peak size of the cache instead.
Finished cells are reused (`omnimem.measure.cells`) unless the model's weights have changed.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from omnimem.backbones import Backbone, parse_device
from omnimem.budget import BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.files import atomic_write_json, file_digest
from omnimem.measure.cells import Cell, Column, choose_methods, device_name, run_cells, table, weights_digest, write_csv
from omnimem.measure.figures import Line, Panel, draw_panels, require_matplotlib
from omnimem.measure.meter import Meter
from omnimem.stream import StreamingSession
from omnimem.stream_settings import StreamSettings
from omnimem.version import __version__

QUESTION = "What is seen and what is heard?"

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Unit of `ru_maxrss` in bytes."""


def bench_command(args: argparse.Namespace) -> None:
    """Check the options, measure cell by cell, print the table; `args` are those of `omnimem.cli`."""
    require_matplotlib()
    methods = choose_methods(args.methods, args.option)
    media: Path = args.media
    if not media.is_file():
        raise OmniMemError(f"{media}: no such file; choose another clip with --media")
    device = parse_device(args.device)
    budget = args.mean_budget or (256 if args.model == "tiny" else 8192)
    stream = {"fps": args.fps, "chunk_seconds": args.chunk_seconds}
    setting = {
        "stream": {key: value for key, value in stream.items() if value is not None},
        "mean_budget": budget,
        "ratio": args.ratio,
        "rounds": args.rounds,
    }
    given = {**setting, "model": str(args.model), "media": str(media), "device": str(device), "dtype": args.dtype}
    backbone = load_model(given)
    common = {
        **setting,
        "command": "bench",
        "version": __version__,
        "weights": weights_digest(backbone),
        "media": file_digest(media),
        "device": device_name(device),
        "dtype": str(backbone.model.dtype).removeprefix("torch."),
    }
    if device.type == "cuda":
        measure = partial(measure_cell, backbone=backbone)
    else:
        del backbone  # each cell loads the model in its own process
        measure = _measure_in_new_process
    cells = []
    for seconds, (name, (method, options)) in product(args.lengths, methods.items()):
        key = {**common, "method": name, "options": method.recorded(), "seconds": seconds}
        task = {**given, "method": name, "options": options, "seconds": seconds}
        labels = {"method": name, "length": seconds}
        cells.append(Cell(f"{name} {seconds:g} s", labels, key, partial(measure, task)))
    about = {"model": str(args.model), **common, "media_name": media.name}

    def save(found: list[dict[str, Any]]) -> None:
        atomic_write_json(args.out / "results.json", {**about, "cells": found})
        write_csv(args.out / "results.csv", found)

    found = run_cells(cells, args.out, args.overwrite, save)
    draw_figure(found, args.out / "bench.png")
    print(bench_table(found))
    print(
        f"{budget} tokens per layer on {common['device']}; written to {args.out}: results.json, results.csv, bench.png"
    )


# ---- one cell --------------------------------------------------------------------------------------------------------


def measure_cell(task: dict[str, Any], backbone: Backbone | None = None) -> dict[str, Any]:
    """Stream a clip to a length and ask a question at the end.

    Parameters
    ----------
    task : dict
        Options of one cell (see `bench_command`).
    backbone : Backbone, optional
        The model; loaded here if not given.

    Returns
    -------
    dict
        ``seconds`` streamed; ``peak_bytes``, ``memory_peak_bytes``, ``device_peak_bytes`` (see `Meter`);
        ``resident_bytes`` (increase of the peak resident set over a stream of one chunk; meaningful only in a new
        process); ``answer_bytes`` (keys and values when the question is asked); ``first_token_ms`` (median of the
        rounds); ``compute_ratio`` (seconds of encoding, forward and selection per second of media: median over chunks
        without the first).
    """
    if backbone is None:
        backbone = load_model(task)
    session = new_session(task, backbone)
    chunk_seconds = session.settings.chunk_seconds
    if task["seconds"] <= chunk_seconds:
        raise OmniMemError(f"--lengths: {task['seconds']:g} s is not longer than a chunk of {chunk_seconds:g} s")
    _stream(session, task["media"], chunk_seconds, 1)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measured = _stream(new_session(task, backbone), task["media"], task["seconds"], task["rounds"])
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
    return {**measured, "resident_bytes": RSS_UNIT * rise}


def load_model(task: dict[str, Any]) -> Backbone:
    """The model of a cell, with its adapter if it is a run."""
    return StreamingSession.from_pretrained(task["model"], device=task["device"], dtype=task["dtype"]).backbone


def new_session(task: dict[str, Any], backbone: Backbone) -> StreamingSession:
    """A session with an empty cache and uniform budgets."""
    profile = BudgetProfile.uniform(backbone.config, task["mean_budget"], task["ratio"])
    settings = StreamSettings.for_backbone(backbone, **task["stream"])
    return StreamingSession(backbone, profile, task["method"], settings, **task["options"])


def _stream(session: StreamingSession, media: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Stream `media` for `seconds` and ask at the end; the first question is a warm-up and is not measured."""
    with Meter(session) as meter:
        *_, end = meter.watch(media, loop_seconds=seconds)
        first_token = [meter.ask(QUESTION, 1)[1] for _ in range(rounds + 1)][1:]
    steps = meter.step_seconds
    return {
        "seconds": end.seconds,
        "peak_bytes": meter.kv_peak,
        "memory_peak_bytes": meter.memory_peak,
        "device_peak_bytes": meter.device_peak,
        "answer_bytes": end.kv_bytes,
        "first_token_ms": 1000 * statistics.median(first_token),
        "compute_ratio": statistics.median(steps) / session.settings.chunk_seconds if steps else None,
    }


def _measure_in_new_process(task: dict[str, Any]) -> dict[str, Any]:
    """Measure a cell in a new Python process."""
    command = [sys.executable, "-m", "omnimem.measure.bench"]
    done = subprocess.run(
        command, input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=False, start_new_session=True
    )
    if done.returncode == -signal.SIGKILL:
        raise MemoryError("killed by the system")
    if done.returncode != 0:
        raise RuntimeError(f"the process of a cell exited with status {done.returncode}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise OmniMemError(answer["error"])
    return answer


def _measure_from_stdin() -> None:
    """Main function of the new process: read the options from stdin, print results or an error, as JSON."""
    try:
        answer = measure_cell(json.load(sys.stdin))
    except OmniMemError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


# ---- table and figure ------------------------------------------------------------------------------------------------


def bench_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table, sorted by stream length, then by peak memory."""
    on_device = rows[0]["device_peak_bytes"] is not None
    columns = [
        Column("method", lambda row: row["method"]),
        Column("stream s", lambda row: row["seconds"], "g"),
        Column(
            "device peak MiB" if on_device else "resident increase MiB",
            lambda row: row["device_peak_bytes" if on_device else "resident_bytes"] / 2**20,
            ".1f",
        ),
        Column("peak KV MiB", lambda row: row["peak_bytes"] / 2**20, ".3f"),
        Column("peak cache MiB", lambda row: row["memory_peak_bytes"] / 2**20, ".3f"),
        Column("answer KV MiB", lambda row: row["answer_bytes"] / 2**20, ".3f"),
        Column("first token ms", lambda row: row["first_token_ms"], ".1f"),
        Column("compute s per media s", lambda row: row["compute_ratio"], ".4f"),
    ]
    return table(columns, sorted(rows, key=lambda row: (row["seconds"], row["peak_bytes"])))


def draw_figure(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Peak memory and first-token latency by stream length, one line per method."""
    on_device = rows[0]["device_peak_bytes"] is not None
    peak = "device_peak_bytes" if on_device else "memory_peak_bytes"
    memory: list[Line] = []
    latency: list[Line] = []
    for name in dict.fromkeys(row["method"] for row in rows):
        members = sorted((row for row in rows if row["method"] == name), key=lambda row: row["seconds"])
        x = [row["seconds"] for row in members]
        memory.append(Line(name, x, [row[peak] / 2**20 for row in members]))
        memory.append(Line(name, x, [row["peak_bytes"] / 2**20 for row in members], dotted=True))
        latency.append(Line(name, x, [row["first_token_ms"] for row in members]))
    measured = "allocated beyond the weights" if on_device else "of the cache"
    panels = [
        Panel("stream (s)", f"peak memory (MiB): {measured}\ndotted: keys and values", memory, log=True),
        Panel("stream (s)", "first token (ms)", latency, log=True),
    ]
    draw_panels(out, panels)


if __name__ == "__main__":
    _measure_from_stdin()

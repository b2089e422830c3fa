"""The command ``omnimem bench``: memory and first-token time against the length of the stream (the paper's figure 4).

    omnimem bench --model tiny --out bench --device cpu

A clip is repeated to the wanted length and streamed through each method; a question is asked at its end. On CUDA the
memory of a cell is what PyTorch allocated at most beyond the weights. On the CPU a cell is a process of its own and its
memory is how far the peak of its resident set rose above that of a stream of one chunk, which has loaded everything
there is to load; small models need little of it, so the exact bytes of keys and values stand beside it. Cells that are
finished are not computed again, see `omnimem.cells`.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from omnimem import __version__
from omnimem.backbones import Backbone, parse_device
from omnimem.cells import Cell, Column, choose_methods, device_name, file_digest, run_cells, table, write_csv
from omnimem.errors import OmniMemError
from omnimem.figures import Line, Panel, draw, require_matplotlib
from omnimem.files import atomic_write_json
from omnimem.measure import Meter
from omnimem.stream import StreamingSession

log = logging.getLogger("omnimem.bench")

SHIPPED = Path(__file__).resolve().parents[1] / "tests" / "media" / "speech_apollo15_hammer_feather_47s.webm"
"""Clip used when none is named; it is part of a checkout, not of an installed package."""

QUESTION = "What is seen and what is heard?"

KIB = 1 if sys.platform == "darwin" else 1024
"""Unit of `ru_maxrss` in bytes."""


def bench_command(args: argparse.Namespace) -> None:
    """Check, fill the table cell by cell, print it; `args` are those of `omnimem.cli`."""
    require_matplotlib()
    methods = choose_methods(args.methods, args.option)
    media = args.media or SHIPPED
    if not media.is_file():
        raise OmniMemError("no clip to stream: give one as --media" if args.media is None else f"{media}: no such file")
    device = parse_device(args.device)
    budget = args.mean_budget or (256 if args.model == "tiny" else 8192)
    settings = {"fps": args.fps, "chunk_seconds": args.chunk_seconds}
    common = {
        "command": "bench",
        "version": __version__,
        "model": str(args.model),
        "media": file_digest(media),
        "stream": {key: value for key, value in settings.items() if value is not None},
        "mean_budget": budget,
        "ratio": args.ratio,
        "rounds": args.rounds,
        "device": device_name(device),
        "dtype": args.dtype,
    }
    measure = in_this_process(str(device)) if device.type == "cuda" else in_a_process_of_its_own
    cells = []
    for seconds, (name, (method, options)) in product(args.lengths, methods.items()):
        key = {**common, "method": name, "options": {**options, **method.settings()}, "seconds": seconds}
        task = {**common, "media": str(media), "device": str(device), "method": name, "options": options}
        task["seconds"] = seconds
        labels = {"method": name, "length": seconds}
        cells.append(Cell(f"{name} {seconds:g} s", labels, key, lambda task=task: measure(task)))

    def save(found: list[dict[str, Any]]) -> None:
        atomic_write_json(args.out / "results.json", {**common, "media_name": media.name, "cells": found})
        write_csv(args.out / "results.csv", found)

    found = run_cells(cells, args.out, args.overwrite, save)
    draw_picture(found, args.out / "bench.png")
    print(bench_table(found))
    print(f"{budget} positions a layer on {common['device']}; written to {args.out}: results.json, results.csv, bench.png")


# ---- one cell --------------------------------------------------------------------------------------------------------


def measure_cell(task: dict[str, Any], backbone: Backbone | None = None) -> dict[str, Any]:
    """Stream a clip to a length and ask at its end.

    Parameters
    ----------
    task : dict
        What `bench_command` makes of the command line.
    backbone : Backbone, optional
        A model loaded before.

    Returns
    -------
    dict
        ``seconds`` streamed; ``peak_bytes``, ``memory_peak_bytes``, ``device_peak_bytes`` (see `Meter`);
        ``resident_bytes`` (rise of the peak resident set over a stream of one chunk; meaningful in a process of its
        own); ``answer_bytes`` (keys and values when the question is asked); ``first_token_ms`` (median of the rounds);
        ``compute_ratio`` (seconds of encoding, forward pass and selection a second of media, first chunk left out).
    """
    first = open_session(task, backbone)
    chunk_seconds = first.settings.chunk_seconds
    if task["seconds"] <= chunk_seconds:
        raise OmniMemError(f"--lengths: {task['seconds']:g} s is not longer than a chunk of {chunk_seconds:g} s")
    stream(first, task["media"], chunk_seconds, 1)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    session = open_session(task, first.backbone)
    del first
    return stream(session, task["media"], task["seconds"], task["rounds"]) | {
        "resident_bytes": KIB * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident)
    }

"""The command ``omnimem compare``: selection methods against each other at equal budgets, on a set of questions.

    omnimem compare runs/quickstart questions.jsonl --out compare --mean-budgets 24,48,96

Every method is given every mean budget (with ``--lam`` and ``--temperature`` also every λ, and every T of the budget
allocation); a cell streams all clips with a fresh memory and asks every question when its time has come. Out come a
table, a JSON and a CSV file, and pictures of accuracy against budget (the paper's figure 6), λ and T (figure 5). Cells
that are finished are not computed again, see `omnimem.cells`; what the numbers are, `omnimem.questions` says.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from omnimem import __version__
from omnimem.backbones import Backbone
from omnimem.budget import BudgetProfile
from omnimem.budget.allocation import with_mean
from omnimem.cells import Cell, Column, choose_methods, device_name, run_cells, table, write_csv
from omnimem.errors import OmniMemError
from omnimem.figures import Line, Panel, draw, require_matplotlib
from omnimem.files import atomic_write_json
from omnimem.questions import Row, answer_questions
from omnimem.selection import SelectionMethod, build_selection, options_of
from omnimem.stream import StreamingSession

SWEEPS = {"lam": "λ", "temperature": "T"}
"""What may be swept beside the budget, and its letter in the paper."""

Budgets = dict[tuple[int, float | None], BudgetProfile]
"""Profiles by mean budget and temperature."""


def compare_command(args: argparse.Namespace, rows: Sequence[Row], digest: str, problems: Sequence[str]) -> None:
    """Check, load once, fill the table, print it; `args` are those of `omnimem.cli`.

    Parameters
    ----------
    args : argparse.Namespace
        The command line.
    rows : sequence of Row
        Clips and questions.
    digest : str
        Hash of `rows`.
    problems : sequence of str
        Why other rows of the manifest cannot be used.
    """
    require_matplotlib()
    methods = choose_methods(args.methods, args.option)
    lambdas = _lambdas(methods, args.lam)
    profile = None if args.profile is None else BudgetProfile.load(args.profile)
    budgets = _budgets(profile, args)
    settings = {"fps": args.fps, "chunk_seconds": args.chunk_seconds, "max_seconds": args.max_seconds}
    session = StreamingSession.from_pretrained(
        args.model,
        profile=profile,
        settings={key: value for key, value in settings.items() if value is not None},
        device=args.device,
        dtype=args.dtype,
    )
    backbone = session.backbone
    session.settings.check(backbone)
    if profile is None:
        ratio = args.ratio or 5.0
        budgets = {(mean, None): BudgetProfile.uniform(backbone.config, mean, ratio) for mean in args.mean_budgets}
    common = {
        "command": "compare",
        "version": __version__,
        "weights": weights_digest(backbone),
        "questions": digest,
        "stream": asdict(session.settings),
        "max_new_tokens": args.max_new_tokens,
        "dtype": str(backbone.model.dtype).removeprefix("torch."),
        "device": device_name(backbone.device),
    }
    warned: set[str] = set()
    cells = []
    for name, (method, options) in methods.items():
        options = {**_recorded(session.profile, name, options), **options}
        places = list(budgets)[:1] if method.keeps_everything else budgets
        for place, lam in product(places, lambdas[name]):
            chosen = options if lam is None else {**options, "lam": lam}
            labels = {"method": name, "mean_budget": place[0], "temperature": place[1], "lam": lam}
            if method.keeps_everything:
                labels = {**labels, "mean_budget": None, "temperature": None}
            cells.append(_cell(labels, budgets[place], chosen, session, rows, common, warned))
    about = {"model": str(args.model), **common, "clips": len(rows), "unusable_rows": list(problems)}

    def save(found: list[dict[str, Any]]) -> None:
        atomic_write_json(args.out / "results.json", {**about, "cells": found})
        write_csv(args.out / "results.csv", found)

    found = run_cells(cells, args.out, args.overwrite, save)
    pictures = draw_pictures(found, args.out)
    print(comparison_table(found))
    left_out = len(problems) + len(found[0]["left_out"])
    print(f"{found[0]['questions']} questions about {len(rows) - len(found[0]['left_out'])} clips", end="")
    print(f", {left_out} clips left out" if left_out else "", end="")
    print(f"; written to {args.out}: results.json, results.csv, {', '.join(pictures)}")


def _cell(
    labels: dict[str, Any],
    profile: BudgetProfile,
    options: dict[str, Any],
    session: StreamingSession,
    rows: Sequence[Row],
    common: dict[str, Any],
    warned: set[str],
) -> Cell:
    """One method at one budget."""
    name = labels["method"]
    method = build_selection(name, **options)
    budget = None if method.keeps_everything else [[layer.visual, layer.audio] for layer in profile.layers]
    # A method's own account of its switches, so that a default that changes is another cell.
    key = {**common, "method": name, "options": {**options, **method.settings()}, "layers": budget}

    def compute() -> dict[str, Any]:
        fresh = StreamingSession(session.backbone, profile, name, session.settings, **options)
        return answer_questions(fresh, rows, common["max_new_tokens"], warned)

    written = [name] + [f"{k}={v:g}" for k, v in labels.items() if k != "method" and v is not None]
    return Cell(" ".join(written), {**labels, "options": key["options"], "layers": budget}, key, compute)


def _recorded(profile: BudgetProfile, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Switches a checkpoint was trained with, for the method it was trained with."""
    recorded = dict(profile.selection)
    same = recorded.pop("method", None) == name and options.get("variant") in (None, recorded.get("variant"))
    return recorded if same else {}


def _lambdas(
    methods: dict[str, tuple[SelectionMethod, dict[str, Any]]], given: Sequence[float] | None
) -> dict[str, list[float | None]]:
    """Of each method the λ it is run with; None: its own."""
    found: dict[str, list[float | None]] = {
        name: [*given] if given and "lam" in options_of(name) else [None] for name in methods
    }
    if given and all(values == [None] for values in found.values()):
        raise OmniMemError(f"--lam: none of the chosen methods ({', '.join(methods)}) has a λ; add omnimem to --methods")
    return found


def _budgets(profile: BudgetProfile | None, args: argparse.Namespace) -> Budgets:
    """Every mean budget and temperature of a given profile; nothing without one.

    Raises
    ------
    OmniMemError
        A mean budget that cannot hold the floors; T without what calibration measured; a ratio beside a profile.
    """
    if args.temperature and (profile is None or profile.statistics.get("method") != "avba"):
        raise OmniMemError("--temperature re-allocates a calibrated profile: give one (omnimem calibrate) as --profile")
    if profile is None:
        return {}
    if args.ratio is not None:
        raise OmniMemError("--ratio is for uniform budgets, and the profile has its own: leave one of the two out")
    budgets: Budgets = {}
    for mean, temperature in product(args.mean_budgets, args.temperature or [None]):
        own = {} if temperature is None else {"temperature": temperature}
        budgets[mean, temperature] = with_mean(replace(profile, statistics={**profile.statistics, **own}), mean)
    return budgets


def weights_digest(backbone: Backbone, samples: int = 1024) -> str:
    """SHA-256 of names, shapes and evenly spaced values of all weights: cheap, and training changes every tensor."""
    digest = hashlib.sha256()
    for name, weight in backbone.model.named_parameters():
        step = max(1, weight.numel() // samples)
        values = weight.detach().flatten()[::step].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(weight.shape)}\n".encode() + values.numpy().tobytes())
    return digest.hexdigest()


# ---- what is shown ---------------------------------------------------------------------------------------------------


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows by budget, the best answers first; what ignores budgets comes last."""
    ordered = sorted(rows, key=lambda row: (row["mean_budget"] or math.inf, -row["accuracy"], row["nll"]))
    sweeps = [Column(letter, lambda row, key=key: row[key], "g") for key, letter in SWEEPS.items() if _swept(rows, key)]
    device = [Column("device peak MiB", lambda row: row["device_peak_bytes"] / 2**20, ".0f")]
    columns = [
        Column("method", lambda row: row["method"]),
        *sweeps,
        Column("mean budget", lambda row: row["mean_budget"]),
        Column("kept a layer", lambda row: row["retained"], ".1f"),
        Column("accuracy %", lambda row: 100 * row["accuracy"], ".1f"),
        Column("95 % interval", lambda row: "{:.0f}–{:.0f}".format(*(100 * end for end in row["accuracy_95"]))),
        Column("nats a token", lambda row: row["nll"], ".3f"),
        Column("answer KV MiB", lambda row: row["answer_bytes"] / 2**20, ".3f"),
        Column("peak KV MiB", lambda row: row["peak_bytes"] / 2**20, ".3f"),
        Column("peak memory MiB", lambda row: row["memory_peak_bytes"] / 2**20, ".3f"),
        *(device if all(row["device_peak_bytes"] is not None for row in rows) else []),
        Column("ms a chunk", lambda row: row["chunk_ms"], ".1f"),
        Column("first token ms", lambda row: row["first_token_ms"], ".1f"),
    ]
    return table(columns, ordered)


def draw_pictures(rows: Sequence[dict[str, Any]], out: Path) -> list[str]:
    """Accuracy and likelihood against budget, and against what was swept; returns the names of the files."""
    pictures = {"accuracy_vs_budget.png": ("mean_budget", "mean budget (positions a layer)")}
    for key, letter in SWEEPS.items():
        if _swept(rows, key):
            pictures[f"accuracy_vs_{'lambda' if key == 'lam' else key}.png"] = (key, letter)
    for name, (axis, title) in pictures.items():
        panels = [
            Panel(title, "accuracy (%), 95 % interval", _lines(rows, axis, "accuracy"), log=axis == "mean_budget"),
            Panel(title, "nats a token of the reference", _lines(rows, axis, "nll"), log=axis == "mean_budget"),
        ]
        draw(out / name, panels)
    return list(pictures)


def _lines(rows: Sequence[dict[str, Any]], axis: str, value: str) -> list[Line]:
    """A line for each setting that differs in something other than `axis`; what has no such axis is level."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if axis != "mean_budget" and row[axis] is None and not row["mean_budget"] is None:
            continue  # a method without λ, in the picture of λ
        others = {"lam": "λ", "temperature": "T", "mean_budget": "budget"}
        said = [f"{others[k]} {row[k]:g}" for k in others if k != axis and row[k] is not None]
        lines.setdefault(" ".join([row["method"], *said]), []).append(row)
    drawn = []
    scale = 100 if value == "accuracy" else 1
    for label, members in lines.items():
        members = sorted(members, key=lambda row: row[axis] or 0)
        y = [scale * row[value] for row in members]
        error = [
            (y_ - 100 * row["accuracy_95"][0], 100 * row["accuracy_95"][1] - y_)
            for y_, row in zip(y, members, strict=True)
        ]
        level = members[0][axis] is None
        x = [] if level else [row[axis] for row in members]
        drawn.append(Line(label, x, y, error if value == "accuracy" and not level else None))
    return drawn


def _swept(rows: Sequence[dict[str, Any]], key: str) -> bool:
    return any(row[key] is not None for row in rows)

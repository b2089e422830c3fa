"""The command ``omnimem compare``: selection methods against each other at equal budgets, on a set of questions.

    omnimem compare runs/quickstart questions.jsonl --out compare --mean-budgets 24,48,96

Every method is given every mean budget (with ``--lambda`` and ``--temperature`` also every λ, and every T of the budget
allocation); a cell streams all clips with a fresh memory and asks every question when its time has come. Out come a
table, a JSON and a CSV file, and pictures of accuracy against budget (the paper's figure 6), λ and T (figure 5). Cells
that are finished are not computed again (`omnimem.measure.cells`); what the numbers are says
`omnimem.measure.questions`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from omnimem import __version__
from omnimem.budget import BudgetProfile
from omnimem.budget.allocation import with_mean
from omnimem.budget.statistics import METHOD
from omnimem.errors import OmniMemError
from omnimem.files import atomic_write_json
from omnimem.measure.cells import Cell, Column, choose_methods, device_name, run_cells, table, weights_digest, write_csv
from omnimem.measure.figures import Line, Panel, draw_panels, require_matplotlib
from omnimem.measure.questions import Row, answer_questions
from omnimem.selection import SelectionMethod, build_selection, options_of
from omnimem.stream import StreamingSession

SWEEPS = {"lambda": "λ", "temperature": "T"}
"""What may be swept beside the budget, and its letter in the paper."""

Place = tuple[int, float | None]
Budgets = dict[Place, BudgetProfile]
"""Profiles by mean budget and temperature of the allocation."""


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
    lambdas = _lambdas(methods, args.lambda_)
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
        for mean in args.mean_budgets:
            budgets[mean, None] = BudgetProfile.uniform(backbone.config, mean, args.ratio or 5.0)
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
            chosen = options if lam is None else {**options, "lambda": lam}
            mean, temperature = (None, None) if method.keeps_everything else place
            labels = {"method": name, "mean_budget": mean, "temperature": temperature, "lambda": lam}
            cells.append(_cell(labels, budgets[place], chosen, session, rows, common, warned))
    about = {"model": str(args.model), **common, "clips": len(rows), "unusable_rows": list(problems)}

    def save(found: list[dict[str, Any]]) -> None:
        atomic_write_json(args.out / "results.json", {**about, "cells": found})
        write_csv(args.out / "results.csv", found)

    found = run_cells(cells, args.out, args.overwrite, save)
    pictures = draw_pictures(found, args.out)
    print(comparison_table(found))
    unread = len(found[0]["left_out"])
    gone = f", {len(problems) + unread} clips left out" if problems or unread else ""
    print(f"{found[0]['questions']} questions about {len(rows) - unread} clips{gone}")
    print(f"{args.out}: results.json, results.csv, {', '.join(pictures)}")


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
    key = {**common, "method": name, "options": method.recorded(), "layers": budget}

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
        name: [*given] if given and "lambda" in options_of(name) else [None] for name in methods
    }
    if given and all(values == [None] for values in found.values()):
        raise OmniMemError(
            f"--lambda: none of the chosen methods ({', '.join(methods)}) has a λ; add omnimem to --methods"
        )
    return found


def _budgets(profile: BudgetProfile | None, args: argparse.Namespace) -> Budgets:
    """Every mean budget and temperature of a given profile; nothing without one.

    Raises
    ------
    OmniMemError
        A mean budget that cannot hold the floors; T without what calibration measured; a ratio beside a profile.
    """
    if args.temperature and (profile is None or profile.statistics.get("method") != METHOD):
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
        Column("95 % interval", lambda row: f"{100 * row['accuracy_low']:.0f}–{100 * row['accuracy_high']:.0f}"),
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
        draw_panels(out / name, panels)
    return list(pictures)


def _lines(rows: Sequence[dict[str, Any]], axis: str, value: str) -> list[Line]:
    """A line for what the settings other than `axis` have in common; level for a method that ignores budgets."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        level = row["mean_budget"] is None and row["lambda"] is None
        if row[axis] is None and not level:
            continue  # a method without λ, in the picture of λ
        others = {"mean_budget": "budget", "lambda": "λ", "temperature": "T"}
        said = [f"{others[key]} {row[key]:g}" for key in others if key != axis and row[key] is not None]
        lines.setdefault(" ".join([row["method"], *said]), []).append(row)
    drawn = []
    for label, members in lines.items():
        points = sorted(members, key=lambda row: row[axis] or 0)
        x = [row[axis] for row in points if row[axis] is not None]
        if value == "nll":
            drawn.append(Line(label, x, [row["nll"] for row in points]))
            continue
        y = [100 * row["accuracy"] for row in points]
        drawn.append(Line(label, x, y, [_spread(row) for row in points]))
    return drawn


def _spread(row: dict[str, Any]) -> tuple[float, float]:
    """Percentage points from the accuracy down and up to the ends of its interval."""
    return tuple(100 * abs(row["accuracy"] - row[end]) for end in ("accuracy_low", "accuracy_high"))


def _swept(rows: Sequence[dict[str, Any]], key: str) -> bool:
    return any(row[key] is not None for row in rows)

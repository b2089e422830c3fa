"""The command ``omnimem compare``: accuracy of selection methods at equal budgets, on a set of questions.

    omnimem compare runs/quickstart questions.jsonl --out compare --mean-budgets 24,48,96     # or --gib 0.5,1

Every method is run at every mean budget (with ``--lambda`` and ``--temperature`` also at every λ, and every T of the
budget allocation). A cell streams each clip into an empty cache and asks every question at its time. The results are a
table, a JSON and a CSV file, and figures of accuracy by budget (arXiv 2606.07577, figure 6), resident
memory, λ and T (figure 5).
Finished cells are reused (`omnimem.measure.cells`); `omnimem.measure.questions` defines the numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from omnimem.budget import BudgetProfile
from omnimem.budget.allocation import with_mean
from omnimem.budget.statistics import METHOD
from omnimem.errors import OmniMemError
from omnimem.files import atomic_write_json
from omnimem.measure.cells import Cell, Column, choose_methods, device_name, run_cells, table, weights_digest, write_csv
from omnimem.measure.figures import Line, Panel, draw_panels, require_matplotlib
from omnimem.measure.questions import Row, answer_questions
from omnimem.memory.token_bytes import within
from omnimem.selection import SelectionMethod, build_selection, options_of
from omnimem.stream import StreamingSession
from omnimem.version import __version__

SWEEPS = {"lambda": "λ", "temperature": "T"}
"""Parameters that can be swept in addition to the budget, and their symbols in the paper."""

MEMORY = "resident MiB"
"""Axis of the figure over total memory."""

BudgetKey = tuple[float | None, int, float | None]
Budgets = dict[BudgetKey, BudgetProfile]
"""Profiles by GiB (if they are given), mean budget and allocation temperature."""

FIELDS = 2
"""Changed with the fields of a cell, so that finished cells without some of them are not reused."""


def compare_command(args: argparse.Namespace, rows: Sequence[Row], digest: str, problems: Sequence[str]) -> None:
    """Check the options, load the model once, measure cell by cell, print the table.

    Parameters
    ----------
    args : argparse.Namespace
        Options of `omnimem.cli`.
    rows : sequence of Row
        Clips and questions.
    digest : str
        Hash of `rows`.
    problems : sequence of str
        Why the other rows of the manifest cannot be used.
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
        for mean in args.mean_budgets or ():
            budgets[None, mean, None] = BudgetProfile.uniform(backbone.config, mean, args.ratio or 5.0)
    common = {
        "command": "compare",
        "fields": FIELDS,
        "version": __version__,
        "weights": weights_digest(backbone),
        "questions": digest,
        "stream": asdict(session.settings),
        "max_new_tokens": args.max_new_tokens,
        "dtype": str(backbone.model.dtype).removeprefix("torch."),
        "kv_dtype": session.cache.kv_dtype,
        "device": device_name(backbone.device),
    }
    warned: set[str] = set()
    cells = []
    for name, (method, options) in methods.items():
        options = {**_recorded(session.profile, name, options), **options}
        for lambda_ in lambdas[name]:
            chosen = options if lambda_ is None else {**options, "lambda": lambda_}
            if method.keeps_everything:
                sizes: dict[Any, BudgetProfile] = {(None, None, None): session.profile}
            else:
                sizes = {**budgets, **_budgets_within(profile, args, session, build_selection(name, **chosen))}
            for (gib, mean, temperature), budget in sizes.items():
                labels = {"method": name, "gib": gib, "mean_budget": mean, "temperature": temperature}
                cells.append(_cell({**labels, "lambda": lambda_}, budget, chosen, session, rows, common, warned))
    about = {"model": str(args.model), **common, "clips": len(rows), "unusable_rows": list(problems)}

    def save(found: list[dict[str, Any]]) -> None:
        atomic_write_json(args.out / "results.json", {**about, "cells": found})
        write_csv(args.out / "results.csv", found)

    found = run_cells(cells, args.out, args.overwrite, save)
    figures = draw_figures(found, args.out)
    print(comparison_table(found))
    unreadable = len(found[0]["skipped_clips"])
    skipped = f", {len(problems) + unreadable} clips skipped" if problems or unreadable else ""
    print(f"{found[0]['questions']} questions about {len(rows) - unreadable} clips{skipped}")
    print(f"{args.out}: results.json, results.csv, {', '.join(figures)}")


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
        kv_dtype, heads = session.cache.kv_dtype, session.heads
        fresh = StreamingSession(session.backbone, profile, name, session.settings, kv_dtype, heads, **options)
        return answer_questions(fresh, rows, common["max_new_tokens"], warned)

    written = [name] + [f"{k}={v:g}" for k, v in labels.items() if k != "method" and v is not None]
    return Cell(" ".join(written), {**labels, "options": key["options"], "layers": budget}, key, compute)


def _recorded(profile: BudgetProfile, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options recorded in the profile, if they belong to this method and variant."""
    recorded = dict(profile.selection)
    same = recorded.pop("method", None) == name and options.get("variant") in (None, recorded.get("variant"))
    return recorded if same else {}


def _lambdas(
    methods: dict[str, tuple[SelectionMethod, dict[str, Any]]], given: Sequence[float] | None
) -> dict[str, list[float | None]]:
    """The values of λ for each method; None: the method's own."""
    found: dict[str, list[float | None]] = {
        name: [*given] if given and "lambda" in options_of(name) else [None] for name in methods
    }
    if given and all(values == [None] for values in found.values()):
        raise OmniMemError(
            f"--lambda: none of the chosen methods ({', '.join(methods)}) has a λ; add omnimem to --methods"
        )
    return found


def _budgets(profile: BudgetProfile | None, args: argparse.Namespace) -> Budgets:
    """Profiles for every mean budget and temperature; empty without a given profile.

    Raises
    ------
    OmniMemError
        A mean budget below the floors; a temperature without a calibrated profile; a ratio together with a profile.
    """
    if args.temperature and (profile is None or profile.statistics.get("method") != METHOD):
        raise OmniMemError(
            "--temperature allocates a calibrated profile again: give one (omnimem calibrate) as --profile"
        )
    if profile is None:
        return {}
    if args.ratio is not None:
        raise OmniMemError("--ratio is for uniform budgets, and --profile has its own: leave one of the two out")
    return {
        (None, mean, temperature): with_mean(_at_temperature(profile, temperature), mean)
        for mean, temperature in product(args.mean_budgets or (), args.temperature or [None])
    }


def _budgets_within(
    profile: BudgetProfile | None, args: argparse.Namespace, session: StreamingSession, method: SelectionMethod
) -> Budgets:
    """Profiles of a method for every number of GiB and temperature; methods differ in the bytes of a token.

    Raises
    ------
    OmniMemError
        Too few GiB for the least budget.
    """
    backbone, budgets = session.backbone, {}
    for gib, temperature in product(args.gib or (), args.temperature or [None]):
        if profile is None:
            given = BudgetProfile.uniform(backbone.config, ratio=args.ratio or 5.0)
        else:
            given = _at_temperature(profile, temperature)
        budget = within(given, gib, backbone, method, session.cache.kv_dtype)
        budgets[gib, round(budget.mean_budget), temperature] = budget
    return budgets


def _at_temperature(profile: BudgetProfile, temperature: float | None) -> BudgetProfile:
    """The profile with another temperature of the budget allocation, not yet allocated again."""
    own = {} if temperature is None else {"temperature": temperature}
    return replace(profile, statistics={**profile.statistics, **own})


# ---- table and figures -----------------------------------------------------------------------------------------------


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table, sorted by the resident bytes of the cache when it is asked, then by accuracy."""
    ordered = sorted(rows, key=lambda row: (row["resident_bytes"], -row["accuracy"], row["nll"]))
    given = [Column("GiB", lambda row: row["gib"], "g")] if _swept(rows, "gib") else []
    sweeps = [Column(letter, lambda row, key=key: row[key], "g") for key, letter in SWEEPS.items() if _swept(rows, key)]
    device = [Column("device peak MiB", lambda row: row["device_peak_bytes"] / 2**20, ".0f")]
    columns = [
        Column("method", lambda row: row["method"]),
        *sweeps,
        *given,
        Column("resident MiB", lambda row: row["resident_bytes"] / 2**20, ".3f"),
        Column("mean budget", lambda row: row["mean_budget"]),
        Column("retained per layer", lambda row: row["retained"], ".1f"),
        Column("accuracy %", lambda row: 100 * row["accuracy"], ".1f"),
        Column("95 % interval", lambda row: f"{100 * row['accuracy_low']:.0f}–{100 * row['accuracy_high']:.0f}"),
        Column("nats per token", lambda row: row["nll"], ".3f"),
        Column("answer KV MiB", lambda row: row["answer_bytes"] / 2**20, ".3f"),
        Column("peak KV MiB", lambda row: row["peak_bytes"] / 2**20, ".3f"),
        Column("peak cache MiB", lambda row: row["memory_peak_bytes"] / 2**20, ".3f"),
        *(device if all(row["device_peak_bytes"] is not None for row in rows) else []),
        Column("ms per chunk", lambda row: row["chunk_ms"], ".1f"),
        Column("first token ms", lambda row: row["first_token_ms"], ".1f"),
    ]
    return table(columns, ordered)


def draw_figures(rows: Sequence[dict[str, Any]], out: Path) -> list[str]:
    """Plot accuracy and likelihood by budget and the swept parameters; return the file names."""
    figures = {
        "accuracy_vs_budget.png": ("mean_budget", "mean budget (tokens per layer)"),
        "accuracy_vs_memory.png": (MEMORY, "resident memory when asked (MiB)"),
    }
    rows = [{**row, MEMORY: row["resident_bytes"] / 2**20} for row in rows]
    for key, letter in SWEEPS.items():
        if _swept(rows, key):
            figures[f"accuracy_vs_{key}.png"] = (key, letter)
    for name, (axis, title) in figures.items():
        panels = [
            Panel(
                title,
                "accuracy (%), 95 % interval",
                _lines(rows, axis, "accuracy"),
                log=axis in ("mean_budget", MEMORY),
            ),
            Panel(
                title, "nats per token of the reference", _lines(rows, axis, "nll"), log=axis in ("mean_budget", MEMORY)
            ),
        ]
        draw_panels(out / name, panels)
    return list(figures)


def _lines(rows: Sequence[dict[str, Any]], axis: str, value: str) -> list[Line]:
    """One line for each combination of the settings other than `axis`; horizontal for a method without a budget."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        horizontal = row["mean_budget"] is None and row["lambda"] is None and axis != MEMORY
        if row[axis] is None and not horizontal:
            continue  # a method without λ, in the figure of λ
        others = {"mean_budget": "budget", "lambda": "λ", "temperature": "T"}
        if axis == MEMORY:  # the budget decides it
            del others["mean_budget"]
        settings = [f"{others[key]} {row[key]:g}" for key in others if key != axis and row[key] is not None]
        lines.setdefault(" ".join([row["method"], *settings]), []).append(row)
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
    """Distance from the accuracy to the lower and upper end of its interval, in percentage points."""
    return tuple(100 * abs(row["accuracy"] - row[end]) for end in ("accuracy_low", "accuracy_high"))


def _swept(rows: Sequence[dict[str, Any]], key: str) -> bool:
    return any(row[key] is not None for row in rows)

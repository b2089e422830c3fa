"""The command `omnimem data prepare`: settings from a recipe and from options, progress, one line at the end."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.manifest import read_manifest
from data_prep.prepare import Report, prepare
from data_prep.prepare.shard import Prepared, Refused
from data_prep.prepared import PrepareSettings
from omnimem.errors import OmniMemError

OPTIONS = ("fps", "short_side", "max_seconds", "audio", "frames", "quality", "sound")


def prepare_command(args: argparse.Namespace) -> None:
    """Prepare what the options say and print what it came to."""
    console = Console(stderr=True)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    settings, manifest, root = PrepareSettings(), args.manifest, args.root
    if args.recipe:
        settings, path, recipe_root = _from_recipe(args.recipe)
        manifest, root = manifest or path, root or (None if manifest else recipe_root)
    if manifest is None:
        raise OmniMemError("no manifest given; name one, or a recipe with --recipe NAME")
    given = {key: getattr(args, key) for key in OPTIONS if getattr(args, key) is not None}
    if "short_side" in given:
        given["short_side"] = None if given["short_side"] == "none" else int(given["short_side"])
    if "audio" in given:
        given["audio"] = given["audio"] == "on"
    settings = replace(settings, **given)
    rows = read_manifest(manifest, root, args.on_bad_row)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("clips", total=len(rows.rows))

        def done(outcome: Prepared | Refused) -> None:
            progress.advance(bar)
            if isinstance(outcome, Refused):
                progress.console.print(f"refused: {outcome.reason}", markup=False, highlight=False, soft_wrap=True)

        report = prepare(
            rows,
            args.to,
            settings,
            clips=args.clips,
            workers=args.workers,
            executor=args.executor,
            on_bad_row=args.on_bad_row,
            began=lambda total: progress.update(bar, total=total),
            done=done,
        )
    print(f"{args.to}: {summary(report, settings)}")


def summary(report: Report, settings: PrepareSettings) -> str:
    """One line: clips, what was done now, length and size."""
    hours = report.seconds / 3600
    per_hour = report.nbytes / 1e6 / hours if hours else 0.0
    left = f", {len(report.problems)} rows left out" if report.problems else ""
    exact = "exact" if settings.exact else "not exact"
    return (
        f"{report.clips} clips ({report.made} made now, {report.clips - report.made} there already{left}), "
        f"{hours:.2f} h, {report.nbytes / 1e6:.1f} MB ({per_hour:.0f} MB an hour, {exact})"
    )


def _from_recipe(words: list[str]) -> tuple[PrepareSettings, str, str | None]:
    """How a recipe reads its data, its manifest and its root; no sound for a model that does not hear."""
    from omnimem.backbones import backbone_class, detect_backbone
    from omnimem.recipe import load_recipe

    name, *pairs = words
    recipe = load_recipe([f"recipe={name}", *pairs])
    backbone = recipe.model.backbone or detect_backbone(recipe.model.name_or_path, use_builtin_config=True)
    data, audio = recipe.data, recipe.data.audio and backbone_class(backbone).hears
    settings = PrepareSettings(fps=data.fps, short_side=data.short_side, max_seconds=data.max_seconds, audio=audio)
    return settings, data.path, data.root

"""The command `omnimem data prepare`: decode with a progress bar, then print one line of summary."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.decoded_clips.format import PrepareSettings
from data_prep.decoded_clips.prepare import Report, prepare
from data_prep.decoded_clips.shard_writer import Prepared, RefusedClip
from data_prep.manifest import read_manifest
from omnimem.errors import OmniMemError

SETTING_OPTIONS = ("fps", "short_side", "max_seconds", "audio", "frame_format", "jpeg_quality", "audio_dtype")
"""Command line options that are fields of `PrepareSettings`."""


@dataclass(frozen=True)
class RecipeData:
    """What ``--recipe`` provides: how the recipe reads its clips, its manifest and its data root."""

    settings: PrepareSettings
    manifest: str
    root: str | None


def prepare_command(args: argparse.Namespace, recipe: RecipeData | None) -> None:
    """Decode the clips that the command line and the recipe name; options override the recipe."""
    console = Console(stderr=True)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    settings, manifest, root = PrepareSettings(), args.manifest, args.root
    if recipe is not None:
        settings = recipe.settings
        root = root or (None if manifest else recipe.root)
        manifest = manifest or recipe.manifest
    if manifest is None:
        raise OmniMemError("no manifest given; name one, or a recipe with --recipe NAME")
    given = {key: getattr(args, key) for key in SETTING_OPTIONS if getattr(args, key) is not None}
    if "short_side" in given:
        given["short_side"] = None if given["short_side"] == "none" else int(given["short_side"])
    if "audio" in given:
        given["audio"] = given["audio"] == "on"
    settings = replace(settings, **given)
    rows = read_manifest(manifest, root, args.on_bad_row)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("clips", total=len(rows.rows))

        def on_clip(outcome: Prepared | RefusedClip) -> None:
            progress.advance(bar)
            if isinstance(outcome, RefusedClip):
                progress.console.print(f"refused: {outcome.reason}", markup=False, highlight=False, soft_wrap=True)

        report = prepare(
            rows,
            args.to,
            settings,
            clips=args.clips,
            workers=args.workers,
            executor=args.executor,
            on_bad_row=args.on_bad_row,
            on_start=lambda total: progress.update(bar, total=total),
            on_clip=on_clip,
        )
    print(f"{args.to}: {summary(report, settings)}")


def summary(report: Report, settings: PrepareSettings) -> str:
    """One line: number of clips, how many were decoded now, total length and size."""
    hours = report.seconds / 3600
    per_hour = report.nbytes / 1e6 / hours if hours else 0.0
    skipped = f", {len(report.problems)} rows skipped" if report.problems else ""
    exact = "exact" if settings.exact else "lossy"
    return (
        f"{report.clips} clips ({report.decoded} decoded now, {report.clips - report.decoded} reused{skipped}), "
        f"{hours:.2f} h, {report.nbytes / 1e6:.1f} MB ({per_hour:.0f} MB per hour, {exact})"
    )

"""The action `omnimem data stats`: its command line arguments.

    omnimem data stats train.jsonl --recipe qwen2_5_omni_lora data.fps=2

Nothing heavy is imported until the action runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_stats_action(actions: Any, shared: argparse.ArgumentParser) -> None:
    """Add the action to the subparsers of `omnimem data`; `shared` are the options every command has."""
    stats = actions.add_parser(
        "stats", parents=[shared], help="hours, tokens by modality and memory, from file headers"
    )
    stats.description = (
        "Hours, tokens by modality and memory of a manifest under a recipe; no weights are loaded, nothing is decoded."
    )
    stats.add_argument("manifest", metavar="MANIFEST", help="manifest, prepared folder, or `quickstart`")
    stats.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe, such as data.fps=2")
    stats.add_argument("--root", type=Path, metavar="DIR", help="folder of its media (default: the manifest's folder)")
    named = "name or path (default: quickstart), followed by key=value overrides"
    stats.add_argument("--recipe", nargs="+", default=["quickstart"], metavar=("NAME", "KEY=VALUE"), help=named)
    stats.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers as JSON")
    stats.set_defaults(command=_stats)


def _stats(args: argparse.Namespace) -> None:
    from train.data_stats import run_stats

    run_stats(args)

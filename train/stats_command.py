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
    stats = actions.add_parser("stats", parents=[shared], help="hours, tokens by modality, memory, from headers alone")
    stats.description = "Count what a manifest becomes in a model: no weight is loaded, nothing is decoded."
    stats.add_argument("manifest", metavar="MANIFEST", help="manifest, prepared folder, or `quickstart`")
    stats.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, such as data.fps=2")
    stats.add_argument("--root", type=Path, metavar="DIR", help="its media (default: beside it)")
    named = "name or path (default: quickstart); further words are its key=value"
    stats.add_argument("--recipe", nargs="+", default=["quickstart"], metavar=("NAME", "KEY=VALUE"), help=named)
    stats.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as JSON as well")
    stats.set_defaults(command=_stats)


def _stats(args: argparse.Namespace) -> None:
    from train.data_stats import stats_command

    stats_command(args)

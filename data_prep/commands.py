"""The actions of `omnimem data`: what each takes on the command line, and the one call it makes.

    omnimem data convert train.json --to train.jsonl
    omnimem data validate train.jsonl
    omnimem data prepare train.jsonl --to prepared
    omnimem data stats train.jsonl

Nothing heavy is imported until an action runs.
"""

from __future__ import annotations

import argparse
from typing import Any


def add_actions(actions: Any, shared: argparse.ArgumentParser) -> None:
    """Add the actions to the subparsers of `omnimem data`; `shared` are the options every command has."""
    _add_convert(actions, shared)
    _add_validate(actions, shared)
    _add_prepare(actions, shared)
    _add_stats(actions, shared)


def _add_convert(actions: Any, shared: argparse.ArgumentParser) -> None: ...


def _add_validate(actions: Any, shared: argparse.ArgumentParser) -> None: ...


def _add_prepare(actions: Any, shared: argparse.ArgumentParser) -> None: ...


def _add_stats(actions: Any, shared: argparse.ArgumentParser) -> None: ...

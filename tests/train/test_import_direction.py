"""Packages import in one direction: omnimem and data_prep never import train; only the command line does."""

from __future__ import annotations

import ast
from pathlib import Path

from clips import ROOT

COMMAND_LINE = set(ROOT.glob("omnimem/cli/*.py"))
FILES = sorted({*ROOT.glob("omnimem/**/*.py"), *ROOT.glob("data_prep/**/*.py")} - COMMAND_LINE)


def imported(file: Path) -> set[str]:
    """First parts of the names of all imported modules, imports inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_train_is_not_imported():
    assert not [str(file.relative_to(ROOT)) for file in FILES if "train" in imported(file)]

"""A table measured cell by cell: each finished cell is saved in a file, so an interrupted run resumes.

    DIR/cells/compare-omnimem-1f0c….json     one cell: its key and its results
    DIR/results.json, DIR/results.csv        the table of all cells of the last command

`omnimem compare` and `omnimem bench` use `run_cells`. The file of a cell is named by a hash of everything its results
depend on, so cells of other settings have other files.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from omnimem.backbones import Backbone
from omnimem.errors import OmniMemError
from omnimem.files import atomic_file, atomic_write_json, remove_leftovers
from omnimem.selection import SelectionMethod, build_selection, untrained_methods

log = logging.getLogger("omnimem.measure.cells")

CELLS = "cells"
"""Subfolder of the output folder for the cells."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes
    ----------
    name : str
        Name in the progress bar and in errors.
    labels : dict
        Its columns that are known before it is computed.
    key : dict
        Everything its results depend on, as JSON.
    compute : callable
        Returns its results, as JSON.
    """

    name: str
    labels: dict[str, Any]
    key: dict[str, Any]
    compute: Callable[[], dict[str, Any]]

    @property
    def file(self) -> str:
        """Name of the cell's file."""
        content = json.dumps(self.key, sort_keys=True).encode()
        return f"{self.key['command']}-{self.key['method']}-{hashlib.sha256(content).hexdigest()[:16]}.json"


def run_cells(
    cells: Sequence[Cell], folder: Path, overwrite: bool, report: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Compute the cells that are not finished yet.

    Parameters
    ----------
    cells : sequence of Cell
    folder : Path
        Output folder; cells are saved in its subfolder ``cells``.
    overwrite : bool
        Compute finished cells again.
    report : callable
        Called after every cell with the rows so far.

    Returns
    -------
    list of dict
        Labels, results and ``file`` of each cell. A cell that runs out of memory is logged and skipped, as happens to
        the method `full` on a long stream.
    """
    rows = []
    if (folder / CELLS).is_dir():
        remove_leftovers(folder / CELLS)
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(cells))
        for cell in cells:
            progress.update(task, description=cell.name)
            file = folder / CELLS / cell.file
            result = None if overwrite else _read(file, cell)
            if result is None:
                try:
                    result = cell.compute()
                except (torch.OutOfMemoryError, MemoryError):
                    log.warning("cell skipped: %s: out of memory", cell.name)
                    progress.advance(task)
                    continue
                atomic_write_json(file, {"key": cell.key, "result": result})
            rows.append({**cell.labels, **result, "file": f"{CELLS}/{cell.file}"})
            report(rows)
            progress.advance(task)
    if not rows:
        raise OmniMemError("every cell ran out of memory; lower the budgets or lengths, or use another device")
    return rows


def _read(file: Path, cell: Cell) -> dict[str, Any] | None:
    """The results of a finished cell; None if it is not finished."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["key"] == json.loads(json.dumps(cell.key)):
            return content["result"]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise OmniMemError(f"{file}: not a finished cell; delete it, or pass --overwrite to compute it again")


@dataclass(frozen=True)
class Column:
    """A printed column: its title, its value in a row, and the format of the value."""

    title: str
    value: Callable[[dict[str, Any]], Any]
    form: str = ""


def table(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned text: the first column left, the others right, a dash for a missing value."""
    cells = [[column.title for column in columns]]
    for row in rows:
        values = [column.value(row) for column in columns]
        cells.append(["-" if v is None else format(v, c.form) for v, c in zip(values, columns, strict=True)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            f"{text:<{w}}" if i == 0 else f"{text:>{w}}" for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the columns with single numbers or texts; lists and objects are only in the JSON file."""
    nested = {name for row in rows for name, value in row.items() if isinstance(value, list | dict)}
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in nested]
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def choose_methods(names: str, given: Sequence[str]) -> dict[str, tuple[SelectionMethod, dict[str, Any]]]:
    """Methods and their options from the command line, checked before a model is loaded.

    Parameters
    ----------
    names : str
        Comma-separated, or ``all`` that need no trained heads.
    given : sequence of str
        ``method.key=value``, the value as JSON or plain text.

    Returns
    -------
    dict
        Name → a built method, and its options.

    Raises
    ------
    OmniMemError
        Unknown method, option or value, or an option for a method that is not in the list.
    """
    chosen = untrained_methods() if names == "all" else [name.strip() for name in names.split(",")]
    options: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for text in given:
        place, equals, value = text.partition("=")
        name, dot, key = place.partition(".")
        if not equals or not dot:
            raise OmniMemError(f"--option {text}: write method.key=value, such as omnimem.variant=release")
        if name not in options:
            raise OmniMemError(f"--option {text}: {name!r} is not among the chosen methods ({', '.join(chosen)})")
        options[name][key] = _value(value)
    built = {}
    for name in chosen:
        try:
            built[name] = (build_selection(name, **options[name]), options[name])
        except TypeError as error:
            raise OmniMemError(f"selection method {name!r} does not take {options[name]}: {error}") from error
    return built


def weights_digest(backbone: Backbone, samples: int = 1024) -> str:
    """SHA-256 of names, shapes and evenly spaced values of all weights: fast, and training changes every tensor."""
    digest = hashlib.sha256()
    for name, weight in backbone.model.named_parameters():
        step = max(1, weight.numel() // samples)
        values = weight.detach().flatten()[::step].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(weight.shape)}\n".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def device_name(device: torch.device) -> str:
    """What times depend on: the accelerator's name, or the CPU architecture and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text

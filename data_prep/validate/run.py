"""`omnimem data validate`: find the files, check each in a worker process, check the rows, write and print the report.

omnimem data validate quickstart --report report.json
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.pool import in_processes, processors
from data_prep.validate.file import check_file
from data_prep.validate.findings import Finding
from data_prep.validate.journal import Journal, file_identity, is_reusable, printable, read_report
from data_prep.validate.print_report import WIDTH, print_report
from data_prep.validate.report import build_report
from data_prep.validate.targets import find_target, is_manifest
from omnimem.errors import OmniMemError
from omnimem.files import atomic_write_json


def validate_command(args: argparse.Namespace) -> None:
    """Check, write the report, print it; see `validate` for the arguments.

    Raises
    ------
    OmniMemError
        Nothing in the target is usable, or something is unusable and ``--strict`` is given.
    """
    report_path = args.report or default_report(args.target)
    report = validate(args.target, args.root, report_path, args.workers, args.fast, args.fresh)
    console = Console()
    print_report(report, console if console.is_terminal else Console(width=WIDTH))
    print(f"report: {printable(report_path)}")
    totals = report["totals"]
    if not totals["usable"]:
        raise OmniMemError(f"nothing in {args.target} is usable; see {printable(report_path)} for the reasons")
    if args.strict and totals["errors"]:
        raise OmniMemError(f"{args.target}: {totals['errors']} {totals['what']} are unusable (--strict)")


def validate(
    target: str,
    root: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    fast: bool = False,
    fresh: bool = False,
) -> dict[str, Any]:
    """Check every file of a manifest or below a folder, and write the report.

    Parameters
    ----------
    target : str
        Manifest (JSON Lines, Parquet), `quickstart`, a folder of media, or one media file.
    root : path, optional
        Data root of a manifest (see `read_manifest`).
    report : path, optional
        JSON file to write; results in it are reused for unchanged files. Default: `default_report`.
    workers : int, optional
        Processes. Default: the number of CPU cores.
    fast : bool
        Open files and read packet timestamps; decode nothing beyond the first frame and audio packet.
    fresh : bool
        Ignore earlier results.

    Returns
    -------
    dict
        The report.

    Raises
    ------
    OmniMemError
        No such target, no readable row or no media in it, or the report cannot be written.
    """
    path = Path(report or default_report(target))
    found = find_target(target, root)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OmniMemError(f"cannot write {path}: {error.strerror}; choose another file with --report") from error
    earlier = read_report(path)
    with Journal(path) as journal:
        known = {} if fresh else {entry["path"]: entry for entry in (*earlier, *journal.entries)}
        entries = _check_files(found.files, known, journal, workers, fast)
        content = build_report(target, found, entries, fast)
        atomic_write_json(path, content)
        journal.finish()
    return content


def default_report(target: str) -> Path:
    """Next to a manifest, under its name; in the working folder for a folder of media and for `quickstart`."""
    path = Path(target)
    if target == "quickstart":
        return Path("quickstart.validated.json")
    if is_manifest(path):
        path = path if path.name not in ("", "..") else Path(os.path.realpath(path))
        return path.with_name(f"{path.stem}.validated.json")
    return Path("validated.json")


def _check_files(
    files: dict[Path, list[str]], known: dict[str, dict[str, Any]], journal: Journal, workers: int | None, fast: bool
) -> dict[str, dict[str, Any]]:
    """Results by path: reused ones, and new ones from worker processes, each written to the journal at once."""
    wanted = {path: file_identity(path, fast) for path in files}
    entries: dict[str, dict[str, Any]] = {}
    for one in wanted.values():
        if (entry := known.get(one["path"])) is not None and is_reusable(entry, one):
            entries[one["path"]] = entry
    missing = [path for path, one in wanted.items() if one["path"] not in entries]
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("media files", total=len(files), completed=len(entries))
        try:
            count = min(workers or processors(), len(missing))
            with closing(in_processes(partial(check_file, fast=fast), missing, count)) as results:
                for path, result in results:
                    entry = {**wanted[path], **(crashed() if result is None else result)}
                    journal.add(entry)
                    entries[entry["path"]] = entry
                    progress.advance(task)
        except KeyboardInterrupt:
            done = f"{len(entries)} of {len(files)} files are checked"
            print(f"{done}; run the same command again to resume", file=sys.stderr)
            raise
    return entries


def crashed() -> dict[str, Any]:
    """Result for a file whose worker process died."""
    message = "the process that checked it died (a crash in a decoder, or out of memory)"
    nothing = {"digest": None, "seconds": None, "has_video": False, "audio": "none", "streams": []}
    return {**nothing, "findings": [Finding("crashed", message).record()]}

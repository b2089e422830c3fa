"""`omnimem data validate`: find the files, look at each, look at the rows, write the report.

omnimem data validate quickstart --report report.json
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import Counter, defaultdict
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.decoded_clips.folder import is_prepared
from data_prep.manifest import Manifest, read_manifest
from data_prep.pool import in_processes, processors
from data_prep.validate.file import AUDIO_SUFFIXES, VIDEO_SUFFIXES, check_file, suffixes
from data_prep.validate.findings import CODES, Finding, worst
from data_prep.validate.journal import Journal, identity, printable, read_report, serves
from data_prep.validate.print_report import WIDE, print_report
from data_prep.validate.rows import check_rows
from omnimem.errors import OmniMemError
from omnimem.files import atomic_write_json

NOT_MEDIA = suffixes(
    "adf ass bin bmp cfg csv db gz heic htm html idf idx ini jpeg jpg json jsonl lock log md ndjson npy npz"
    " parquet pdf pickle pkl png py rst safetensors sh srt sub tar tif tiff toml tsv txt vtt webp xb xml yaml yml zip"
)
"""Of these nothing is opened; FFmpeg would read some of them as a film of one picture, draw others as text."""


def validate_command(args: argparse.Namespace) -> None:
    """Check, report, print; see `validate` for the arguments.

    Raises
    ------
    OmniMemError
        Nothing in the target can be used, or anything cannot and ``--strict`` is given.
    """
    report_path = args.report or default_report(args.target)
    report = validate(args.target, args.root, report_path, args.workers, args.fast, args.fresh)
    console = Console()
    print_report(report, console if console.is_terminal else Console(width=WIDE))
    print(f"report: {printable(report_path)}")
    totals = report["totals"]
    if not totals["usable"]:
        raise OmniMemError(f"nothing in {args.target} can be used; {printable(report_path)} says why, file by file")
    if args.strict and totals["errors"]:
        raise OmniMemError(f"{args.target}: {totals['errors']} {totals['what']} cannot be used (--strict)")


def validate(
    target: str,
    root: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    fast: bool = False,
    fresh: bool = False,
) -> dict[str, Any]:
    """Look at every file of a manifest, or below a folder, and write what was found.

    Parameters
    ----------
    target : str
        Manifest (JSON Lines, Parquet), `quickstart`, a folder of media, or one media file.
    root : path, optional
        Of a manifest's media (see `read_manifest`).
    report : path, optional
        JSON to write; results in it are used again for files that have not changed. Default: `default_report`.
    workers : int, optional
        Processes; default: as many as processors.
    fast : bool
        Open files and read their packets' times, decode nothing beyond the first picture and sound.
    fresh : bool
        Use no earlier result.

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
    files, ignored, manifest = _find(target, root)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OmniMemError(f"cannot write {path}: {error.strerror}; name a place with --report") from error
    earlier = read_report(path)
    with Journal(path) as journal:
        kept = {} if fresh else {entry["path"]: entry for entry in (*earlier, *journal.entries)}
        entries = _look_at(files, kept, journal, workers, fast)
        content = _report(target, files, ignored, manifest, entries, fast)
        atomic_write_json(path, content)
        journal.finish()
    return content


def default_report(target: str) -> Path:
    """Beside a manifest, under its name; in the working folder for a folder of media and for `quickstart`."""
    path = Path(target)
    if target == "quickstart":
        return Path("quickstart.validated.json")
    if _is_manifest(path):
        path = path if path.name not in ("", "..") else Path(os.path.realpath(path))
        return path.with_name(f"{path.stem}.validated.json")
    return Path("validated.json")


def _is_manifest(path: Path) -> bool:
    if path.is_dir():
        return any(path.glob("*.parquet"))
    return path.suffix.lower() not in VIDEO_SUFFIXES | AUDIO_SUFFIXES


def _find(
    target: str, root: str | os.PathLike[str] | None
) -> tuple[dict[Path, list[str]], list[dict[str, str]], Manifest | None]:
    """The files to look at with the names they go by, what is passed over, and the manifest if it is one."""
    path = Path(target)
    if is_prepared(path):
        raise OmniMemError(f"{target} is a prepared folder, whose clips were read to their end; name their manifest")
    if target == "quickstart" or _is_manifest(path):
        manifest = _read_quietly(target, root)
        return _files_of_manifest(manifest), [], manifest
    if root is not None:
        raise OmniMemError(f"--root is for manifests, and {target} is none; leave it out")
    if path.is_dir():
        files, ignored = _walk(path)
        if not files:
            raise OmniMemError(f"{target}: no media in this folder ({len(ignored)} other files)")
        return files, ignored, None
    return {Path(os.path.realpath(path)): [printable(path.name)]}, [], None


def _read_quietly(target: str, root: str | os.PathLike[str] | None) -> Manifest:
    """Read a manifest; bad rows come with the report, not as warnings before it."""
    log = logging.getLogger("omnimem.data")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return read_manifest(target, root, on_bad_row="skip")
    finally:
        log.setLevel(level)


def _files_of_manifest(manifest: Manifest) -> dict[Path, list[str]]:
    names: dict[Path, list[str]] = {}
    for row in manifest.rows:
        names[row.media] = [printable(row.name)]
        if row.audio_path is not None and row.audio_path not in names:
            names[row.audio_path] = [printable(os.path.relpath(row.audio_path, row.media.parent))]
    return names


def _walk(folder: Path) -> tuple[dict[Path, list[str]], list[dict[str, str]]]:
    """Files below a folder in the order of their names; links to files are followed, links to folders are not."""
    files: dict[Path, list[str]] = defaultdict(list)
    ignored = []

    def unreadable(error: OSError) -> None:
        ignored.append({"name": printable(error.filename), "reason": f"cannot be read: {error.strerror}"})

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            shown = printable(path.relative_to(folder))
            if name.startswith("."):
                ignored.append({"name": shown, "reason": "a hidden file"})
            elif not path.is_file():  # a pipe would block whoever opens it
                ignored.append({"name": shown, "reason": "not a file, or a link to nothing"})
            elif path.suffix.lower() in NOT_MEDIA:
                ignored.append({"name": shown, "reason": f"{path.suffix} is no media"})
            else:
                files[Path(os.path.realpath(path))].append(shown)
    return dict(files), ignored


def _look_at(
    files: dict[Path, list[str]], kept: dict[str, dict[str, Any]], journal: Journal, workers: int | None, fast: bool
) -> dict[str, dict[str, Any]]:
    """Results by path: those kept, and the others from worker processes, into the journal as they come."""
    wanted = {path: identity(path, fast) for path in files}
    entries: dict[str, dict[str, Any]] = {}
    for one in wanted.values():
        if (entry := kept.get(one["path"])) is not None and serves(entry, one):
            entries[one["path"]] = entry
    todo = [path for path, one in wanted.items() if one["path"] not in entries]
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("media files", total=len(files), completed=len(entries))
        try:
            count = min(workers or processors(), len(todo))
            with closing(in_processes(partial(check_file, fast=fast), todo, count)) as results:
                for path, result in results:
                    entry = {**wanted[path], **(crashed() if result is None else result)}
                    journal.add(entry)
                    entries[entry["path"]] = entry
                    progress.advance(task)
        except KeyboardInterrupt:
            done = f"{len(entries)} of {len(files)} files are checked"
            print(f"{done}; the same command goes on from there", file=sys.stderr)
            raise
    return entries


def crashed() -> dict[str, Any]:
    """Result for a file whose worker died."""
    message = "the process that looked at it died (a crash in a decoder, or no memory left)"
    nothing = {"digest": None, "seconds": None, "picture": False, "sound": "none", "streams": []}
    return {**nothing, "findings": [Finding("crashed", message).record()]}


def _report(
    target: str,
    files: dict[Path, list[str]],
    ignored: list[dict[str, str]],
    manifest: Manifest | None,
    entries: dict[str, dict[str, Any]],
    fast: bool,
) -> dict[str, Any]:
    listed, ignored = [], list(ignored)
    for path, names in files.items():
        entry = {**entries[printable(path)], "names": names}
        reason = next((f["message"] for f in entry["findings"] if f["code"] == "cannot_open"), None)
        if manifest is None and reason is not None and path.suffix.lower() not in VIDEO_SUFFIXES | AUDIO_SUFFIXES:
            ignored.append({"name": names[0], "reason": reason})  # nothing says that it should be media
        else:
            listed.append(entry)
    verdicts = [worst(entry["findings"]) for entry in listed]
    broken = verdicts.count("error")
    report: dict[str, Any] = {
        "target": printable(target),
        "fast": fast,
        "totals": {
            "files": len(listed),
            "with_errors": broken,
            "with_warnings": verdicts.count("warning"),
            "fine": len(listed) - broken - verdicts.count("warning"),
            "hours": round(sum(entry["seconds"] or 0 for entry in listed) / 3600, 4),
            "bytes": sum(entry["size"] for entry in listed if entry["size"] > 0),
            "what": "files",
            "errors": broken,
            "usable": len(listed) - broken,
        },
    }
    codes = Counter(code for entry in listed for code in {finding["code"] for finding in entry["findings"]})
    if manifest is not None:
        report["rows"] = rows = check_rows(manifest.rows, entries)
        rows["count"] = len(manifest.rows) + len(manifest.problems)
        bad = [Finding("bad_row", printable(problem)).record() for problem in manifest.problems]
        rows["findings"] = [*({**one, "lines": [], "media": None} for one in bad), *rows["findings"]]
        codes.update(finding["code"] for finding in rows["findings"])
        unusable = sum(1 for finding in rows["findings"] if finding["severity"] == "error")
        report["totals"] |= {"what": "rows", "errors": unusable, "usable": rows["usable"]}
    report["codes"] = {code: codes[code] for code in CODES if codes[code]}
    report["duplicates"] = _same_content(listed)
    report["ignored"] = ignored
    report["files"] = listed
    return report


def _same_content(listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Names that hold the same bytes."""
    groups: dict[str, list[str]] = defaultdict(list)
    for entry in listed:
        groups[entry["digest"] or entry["path"]] += entry["names"]
    return [{"digest": digest, "names": names} for digest, names in groups.items() if len(names) > 1]

"""Open the clips of a manifest before training: in parallel, and only those that changed since the last start.

The result (`MediaInfo`) is cached in ``$OMNIMEM_CACHE`` or ``~/.cache/omnimem``, one file per manifest. It is reused as
long as path, size and modification time of the clip and the versions of PyAV and FFmpeg are the same. A clip that could
not be opened is tried again at every start.

    python -c "from data_prep.clip_info import open_rows; from data_prep.manifest import read_manifest as r; \
print(open_rows(r('quickstart').rows, 'quickstart'))"
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
from rich.console import Console
from rich.progress import track

from data_prep.manifest import Row
from data_prep.pool import processors
from omnimem.errors import OmniMemError
from omnimem.files import atomic_write_text
from omnimem.media import MediaInfo, open_media

WORKERS = min(32, 2 * processors())
"""Threads that open clips: FFmpeg releases the GIL, and opening mostly waits for the file system."""

log = logging.getLogger("omnimem.data")


@dataclass(frozen=True, kw_only=True)
class OpenedRow(Row):
    """A row whose clip has been opened.

    Attributes
    ----------
    info : MediaInfo
        Facts about the clip, including its separate audio file if it has one.
    """

    info: MediaInfo


def open_rows(rows: Sequence[Row], manifest: str | os.PathLike[str]) -> list[OpenedRow | OmniMemError]:
    """Open the clips of all rows.

    Parameters
    ----------
    rows : sequence of Row
    manifest : path
        The manifest of the rows; results are cached under its path.

    Returns
    -------
    list of OpenedRow or OmniMemError
        For each row, the row with its `MediaInfo`, or the error if its clip cannot be opened.
    """
    file = cache_folder() / "clips" / f"{hashlib.sha256(os.path.realpath(manifest).encode()).hexdigest()[:32]}.json"
    known = _read(file)
    keys = [_key(row) for row in rows]
    found: dict[str, MediaInfo | OmniMemError] = {key: known[key] for key in keys if key in known}
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in found}
    if missing:
        try:
            _open(missing, found)
        finally:  # after an interruption, too
            _write(file, {key: info for key, info in found.items() if isinstance(info, MediaInfo)})
    outcomes = [found[key] for key in keys]
    return [
        OpenedRow(**vars(row), info=one) if isinstance(one, MediaInfo) else one
        for row, one in zip(rows, outcomes, strict=True)
    ]


def cache_folder() -> Path:
    """Folder of cached results, which can be deleted at any time."""
    if folder := os.environ.get("OMNIMEM_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omnimem"
    except RuntimeError:  # no home folder, as in some containers
        return Path(tempfile.gettempdir()) / f"omnimem-{os.getuid()}"


def _open(missing: dict[str, Row], found: dict[str, MediaInfo | OmniMemError]) -> None:
    """Open the clips of `missing` in threads and add the results to `found` under the same keys."""
    console = Console(stderr=True)
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="open") as pool:
        try:
            futures = {pool.submit(_open_clip, row): key for key, row in missing.items()}
            done = as_completed(futures)
            if console.is_terminal:
                done = track(done, "opening clips", len(futures), console=console, transient=True)
            for future in done:
                found[futures[future]] = future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _open_clip(row: Row) -> MediaInfo | OmniMemError:
    try:
        return open_media(row.media, audio_path=row.audio_path).info
    except OmniMemError as error:
        return error


def _key(row: Row) -> str:
    """Path, size and modification time of all files of a row."""
    status = [path.stat() for path in row.files]
    return json.dumps([[str(p), s.st_size, s.st_mtime_ns] for p, s in zip(row.files, status, strict=True)])


def _versions() -> dict[str, str]:
    return {"av": av.__version__, "ffmpeg": av.ffmpeg_version_info}


def _read(file: Path) -> dict[str, MediaInfo]:
    """Cached results; none if they are from other versions or cannot be read."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        if content["versions"] != _versions():
            return {}
        return {key: MediaInfo.from_dict(info) for key, info in content["clips"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(file: Path, clips: dict[str, MediaInfo]) -> None:
    content = {"versions": _versions(), "clips": {key: asdict(info) for key, info in clips.items()}}
    try:
        atomic_write_text(file, json.dumps(content))
    except (OmniMemError, OSError) as error:
        log.warning("result not cached, so all clips will be opened again at the next start: %s", error)

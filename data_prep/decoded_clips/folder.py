"""Read a prepared folder: its settings and its rows. No clip is opened.

python -c "from data_prep.decoded_clips.folder import read_prepared as r; print(r('prepared').rows)"
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.decoded_clips.format import VERSION, ClipMetadata, PrepareSettings
from data_prep.manifest import Manifest, Question, Row
from omnimem.errors import OmniMemError
from omnimem.media import MediaInfo

SETTINGS_FILE, ROWS_FILE, CLIPS_FOLDER = "prepared.json", "rows.jsonl", "clips"

log = logging.getLogger("omnimem.data")


@dataclass(frozen=True, kw_only=True)
class PreparedRow(Row):
    """A row whose `media` is a shard.

    Attributes
    ----------
    info : MediaInfo
        Of the original file.
    original : list
        `Row.content` of the manifest's row.
    """

    info: MediaInfo
    original: list[Any]

    def content(self) -> list[Any]:
        """As for the original row: a run may be resumed on either the manifest or its prepared folder."""
        return self.original


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a complete prepared folder."""
    return Path(path, SETTINGS_FILE).is_file()


def read_settings(folder: str | os.PathLike[str]) -> tuple[PrepareSettings, Path]:
    """Settings of a prepared folder, and the folder of its shards.

    Raises
    ------
    OmniMemError
        Not a prepared folder, or one of another format version.
    """
    file = Path(folder, SETTINGS_FILE)
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["version"] != VERSION:
            raise OmniMemError(
                f"{folder}: prepared in format {known['version']}; this version reads {VERSION}: delete it and prepare "
                "again"
            )
        return PrepareSettings(**known["settings"]), Path(os.path.realpath(folder), known["clips"])
    except OSError as error:
        raise OmniMemError(f"{folder}: not a prepared folder ({error.strerror}: {SETTINGS_FILE})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise OmniMemError(
            f"{file}: not written by `omnimem data prepare` ({error}); delete it and prepare again"
        ) from error


def read_prepared(folder: str | os.PathLike[str], on_bad_row: str = "error") -> Manifest:
    """Read the rows of a prepared folder.

    Parameters
    ----------
    folder : path
        Output of `omnimem data prepare`.
    on_bad_row : {"error", "skip"}
        What to do about a row whose shard is missing or truncated.

    Raises
    ------
    OmniMemError
        Not a prepared folder; no usable row; or, if `on_bad_row` is "error", a shard that is missing or truncated.
    """
    _, clips = read_settings(folder)
    rows: list[Row] = []
    problems: list[str] = []
    for known in read_records(folder):
        try:
            row = PreparedRow(
                media=clips / known["shard"],
                questions=tuple(Question(**question) for question in known["questions"]),
                audio=known["audio"],
                line=known["line"],
                name=known["name"],
                info=replace(ClipMetadata.from_dict(known["clip"]).info, path=known["name"]),
                original=known["content"],
            )
            nbytes = known["nbytes"]
        except (KeyError, TypeError) as error:
            raise OmniMemError(
                f"{Path(folder, ROWS_FILE)}: not written by `omnimem data prepare` ({error}); prepare again"
            ) from error
        if is_complete(row.media, nbytes):
            rows.append(row)
        else:
            problems.append(
                f"{folder}:{row.line}: {row.name}: its shard {row.media} is missing or truncated; prepare again"
            )
    for problem in problems:
        if on_bad_row == "error":
            raise OmniMemError(f"{problem} (data.on_bad_row=skip skips the row)")
        log.warning("row skipped: %s", problem)
    if not rows:
        raise OmniMemError(f"{folder}: no usable row; {problems[0] if problems else 'prepare again'}")
    return Manifest(rows, problems)


def read_records(folder: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The lines of `rows.jsonl`."""
    file = Path(folder, ROWS_FILE)
    try:
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    except (OSError, ValueError) as error:
        raise OmniMemError(f"{file}: cannot be read ({error}); prepare again") from error


def is_complete(shard: Path, nbytes: int) -> bool:
    """Whether a shard exists with its full size: copying a folder may have been interrupted."""
    try:
        return shard.stat().st_size == nbytes
    except OSError:
        return False

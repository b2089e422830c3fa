"""Read a manifest file (JSON Lines, or Parquet: one file or a folder of shards) and check every row.

A Parquet manifest has columns of the same names as the JSON keys; an empty cell counts as an absent key.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.manifest.check import BadRow, read_row
from data_prep.manifest.rows import Manifest, Row
from data_prep.shipped import QUICKSTART
from omnimem.errors import OmniMemError

log = logging.getLogger("omnimem.data")


def read_manifest(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, on_bad_row: str = "error"
) -> Manifest:
    """Read and check a manifest.

    Parameters
    ----------
    path : path
        The manifest (JSON Lines; Parquet file or folder), or `quickstart`: the clips that ship with the package.
    root : path, optional
        The data root: media paths are relative to it and must lie inside it. Default: the manifest's folder.
    on_bad_row : {"error", "skip"}
        Refuse the manifest, or skip the row, log the reason and list it in `Manifest.problems`.

    Raises
    ------
    OmniMemError
        A bad row under "error"; no good row; no such manifest or root.
    """
    file = _manifest_file(path)
    folder = media_root(path, root)
    if not folder.is_dir():
        raise OmniMemError(f"{root or file.parent}: not a folder; set data.root to the folder with the media of {file}")
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            rows.append(read_row(line, number, folder))
        except BadRow as reason:
            problems.append(f"{file}:{number}: {reason}")

    if problems and on_bad_row == "error":
        more = f"; {len(problems) - 1} more bad rows" if len(problems) > 1 else ""
        raise OmniMemError(f"{problems[0]}{more} (data.on_bad_row=skip skips bad rows)")
    for problem in problems:
        log.warning("row skipped: %s", problem)
    if not rows:
        found = f"; {len(problems)} bad rows, the first: {problems[0]}" if problems else ": the file is empty"
        raise OmniMemError(f"manifest {file} has no usable row{found}")
    return Manifest(rows, problems)


def media_root(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Path:
    """The data root of a manifest (see `read_manifest`)."""
    return Path(os.path.realpath(_manifest_file(path).parent if root is None else root))


def drop_nulls(value: Any) -> Any:
    """Drop keys without a value at every level: a Parquet row has a cell for every column."""
    if isinstance(value, dict):
        return {key: drop_nulls(one) for key, one in value.items() if one is not None}
    return [drop_nulls(one) for one in value] if isinstance(value, list) else value


def _manifest_file(path: str | os.PathLike[str]) -> Path:
    return QUICKSTART if os.fspath(path) == "quickstart" else Path(path)


def _lines(file: Path) -> Iterable[bytes]:
    """The rows as JSON, one at a time."""
    shards = sorted(file.glob("*.parquet")) if file.is_dir() else [file]
    if file.is_dir() and not shards:
        raise OmniMemError(f"manifest {file}: a folder without *.parquet; give a JSON Lines file or a folder of shards")
    if shards[0].suffix == ".parquet":
        return _parquet_lines(file, shards)
    try:
        return file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise OmniMemError(f"manifest {file}: {error.strerror}") from error


def _parquet_lines(file: Path, shards: list[Path]) -> Iterator[bytes]:
    from datasets import load_dataset

    try:
        stream = load_dataset("parquet", data_files=[str(shard) for shard in shards], split="train", streaming=True)
        for row in stream:
            yield json.dumps(drop_nulls(row), ensure_ascii=False, default=str).encode()
    except (OSError, ValueError) as error:  # what pyarrow and datasets raise
        raise OmniMemError(
            f"manifest {file}: not readable as Parquet ({' '.join(str(error).split())[:200]})"
        ) from error

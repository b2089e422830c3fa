"""Rows of `datasets`: saved to disk, Parquet or Arrow files, or on the hub; their columns follow one of the formats.

Media columns are not decoded, only their paths are read. Parquet files and hub data sets are streamed.

    omnimem data convert owner/name --split train --root clips --to train.jsonl
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.manifest import drop_nulls
from omnimem.errors import OmniMemError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SAVED_FILES = ("dataset_info.json", "dataset_dict.json")


def is_dataset(source: str) -> bool:
    """Whether this module reads `source`, judged by its name and by the files in it."""
    path = Path(source)
    if path.is_dir() or path.suffix in (".parquet", ".arrow"):
        return True
    return is_hub(source)


def is_hub(source: str) -> bool:
    """Whether `source` looks like a hub id and is neither a local path nor a misspelled one."""
    path = Path(source)
    file = path.suffix.startswith((".js", ".csv", ".tsv", ".parquet", ".arrow"))
    return HUB_ID.fullmatch(source) is not None and not file and not path.exists()


def rows(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place, `source[index]`, and the cells that are not empty, row by row.

    Raises
    ------
    OmniMemError
        The data set or split does not exist or cannot be read.
    """
    try:
        for index, row in enumerate(_open(source, split)):
            yield f"{source}[{index}]", drop_nulls(row)
    except (OSError, ValueError, ImportError) as error:  # what pyarrow, datasets and the hub raise
        words = " ".join(str(error).split())[:200]
        raise OmniMemError(f"{source}: not readable as a data set ({words}); see --split and --from") from error


def _open(source: str, split: str) -> Any:
    import datasets

    path = Path(source)
    if any((path / name).exists() for name in SAVED_FILES):
        data = datasets.load_from_disk(source)
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise OmniMemError(f"{source}: no split {split}; choose --split among {', '.join(map(str, data))}")
            data = data[split]
        data = data.to_iterable_dataset()
    elif path.is_dir() or path.suffix in (".parquet", ".arrow"):
        kind = "arrow" if path.suffix == ".arrow" else "parquet"
        shards = sorted(str(shard) for shard in path.rglob("*.parquet")) if path.is_dir() else [source]
        if not shards:
            raise OmniMemError(
                f"{source}: a folder without *.parquet, and not written by save_to_disk; name a data set or a file"
            )
        data = datasets.load_dataset(kind, data_files=shards, split="train", streaming=True)
    else:
        data = datasets.load_dataset(source, split=split, streaming=True)
    # decode(False), which turns media columns into paths, needs the types of the columns.
    return data.decode(False) if data.features is not None else data

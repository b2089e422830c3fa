"""Read the rows of a source one at a time, each with its place, and detect the format of a row.

A place is `file:line` (JSON Lines, tables) or `file[index]` (a JSON array, a data set).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.manifest import BadRow, short
from omnimem.errors import OmniMemError

from . import huggingface, sharegpt, swift, table, video_salmonn2
from .options import AnswerForm
from .sample import Sample

FORMATS = ("auto", "video_salmonn2", "sharegpt", "swift", "csv", "huggingface")

LONGEST_CELL = 2**24  # characters of a table cell; the default of csv is 128 KiB

Found = tuple[str, Any]  # a place, and the row there or a BadRow


def read_rows(source: str, name: str, split: str) -> Iterator[Found]:
    """Yield every row of `source` with its place; a BadRow in place of a row that cannot be parsed.

    Parameters
    ----------
    source : str
        File, folder of a data set, or hub id.
    name : str
        One of FORMATS.
    split : str
        Split of a data set that has splits.

    Raises
    ------
    OmniMemError
        The file as a whole cannot be read.
    """
    path = Path(source)
    if name == "huggingface" or (name != "csv" and huggingface.is_dataset(source)):
        return huggingface.rows(source, split)
    if not path.is_file():
        raise OmniMemError(f"{source}: no such file; give a file, a data set folder, or a hub id owner/name")
    if name == "csv" or path.suffix.lower() in (".csv", ".tsv"):
        return _table_rows(path)
    return _json_rows(path)


def read_sample(row: Any, source: str, name: str, answers: AnswerForm) -> Sample:
    """Read a row in the format `name`, or in the format detected from its keys.

    Raises
    ------
    BadRow
        Why the row is refused.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"a row is an object, got {short(row)}")
    name = name if name not in ("auto", "huggingface") else detect(row, source)
    if name == "csv":
        return table.read(row, answers)
    return {"video_salmonn2": video_salmonn2, "sharegpt": sharegpt, "swift": swift}[name].read(row)


def detect(row: Mapping[str, Any], source: str) -> str:
    """Name the format of a row.

    A row with `messages` is read as ms-swift in JSON Lines or if it has keys of ms-swift, else as LLaMA-Factory.

    Raises
    ------
    BadRow
        No format fits.
    """
    keys = set(row)
    if "media" in keys and keys & {"question", "questions"}:
        raise BadRow("it is already a row of a manifest; use omnimem data validate to check it")
    if keys & {"rejected_response", "rejected_messages", "query"} and not table.has_columns(row):
        return "swift"
    if "conversations" in keys:
        return "video_salmonn2" if not keys & {"videos", "audios"} and keys & {"video", "audio"} else "sharegpt"
    if "messages" in keys:
        return "swift" if source.endswith(".jsonl") else "sharegpt"
    if keys & {"videos", "audios"} and keys & {"conversation", "instruction"}:
        return "sharegpt"
    if table.has_columns(row, least=2):  # a data set row has no key for an empty cell
        return "csv"
    raise BadRow(f"format not recognised; its keys are {short(', '.join(map(str, row)))}; name it with --from")


def _json_rows(path: Path) -> Iterator[Found]:
    """Rows of a JSON array, read at once, or of a JSON Lines file, read line by line."""
    try:
        with path.open("rb") as file:
            if file.read(3) != b"\xef\xbb\xbf":
                file.seek(0)
            start = file.tell()
            head = file.read(4096).lstrip()
            file.seek(start)
            if head[:1] == b"[":
                rows = json.load(file, object_pairs_hook=_unique_keys)
                yield from ((f"{path}[{index}]", row) for index, row in enumerate(rows))
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parsed(line)
    except OSError as error:
        raise OmniMemError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise OmniMemError(
            f"{path}: not a JSON array ({error}); give one, or JSON Lines with an object a line"
        ) from error


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        return BadRow(f"not valid JSON: {error} (a JSON array, or one object per line)")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Any:
    """The object; a BadRow if it or an object in it has a key twice, because JSON would silently drop one value."""
    row = dict(pairs)
    if len(row) < len(pairs):
        return BadRow("the same key is given twice")
    values = (one for value in row.values() for one in (value if isinstance(value, list) else [value]))
    return next((one for one in values if isinstance(one, BadRow)), row)


def _table_rows(path: Path) -> Iterator[Found]:
    csv.field_size_limit(LONGEST_CELL)
    try:
        # Bytes that are not UTF-8, or a misplaced quote, make one row bad, not the whole table.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header = file.readline()
            file.seek(0)
            table_rows = csv.DictReader(file, delimiter=max("\t;,", key=header.count), strict=True)
            names = table_rows.fieldnames or ()
            if not table.has_columns(names) or len(set(names)) < len(names):
                raise OmniMemError(
                    f"{path}: the first line must name columns video, question and answer (in UTF-8), each name once; "
                    f"it is {short(header.strip())}"
                )
            while True:
                before = table_rows.reader.line_num
                try:
                    row, number = next(table_rows), table_rows.line_num
                except StopIteration:
                    return
                except csv.Error as error:
                    why = f"not a row of a table ({error}); a quote may be missing"
                    row, number = BadRow(why), before + 1  # its first line: an unclosed quote swallows the next ones
                else:
                    # Cells beyond the last column are stored under None: an unquoted separator shifted the cells.
                    if None in row:
                        row = BadRow("more cells than columns; quote texts that contain the separator")
                yield f"{path}:{number}", row
    except (OSError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) else f"not a table ({error})"
        raise OmniMemError(f"{path}: {why}") from error

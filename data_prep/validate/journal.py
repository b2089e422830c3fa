"""Results kept from one run to the next: the report, and the journal of a run that is not finished.

A result is used again for a file with the same path, size and time of modification, checked by this version of the
checks, of PyAV and of FFmpeg; one that was decoded in full also serves `--fast`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import av

from omnimem.errors import OmniMemError
from omnimem.files import explained_disk_errors

VERSION = 2  # of the checks: a change of what is looked at invalidates what was found before

KEYS = {"path", "size", "mtime_ns", "checks", "findings"}  # without which an entry is none of ours


def identity(path: Path, fast: bool) -> dict[str, Any]:
    """What a result belongs to; a file that is not there (any more) has size -1."""
    try:
        stat = path.stat()
        size, modified = stat.st_size, stat.st_mtime_ns
    except OSError:
        size, modified = -1, 0
    checks = {"version": VERSION, "av": av.__version__, "ffmpeg": av.ffmpeg_version_info, "fast": fast}
    return {"path": printable(path), "size": size, "mtime_ns": modified, "checks": checks}


def serves(entry: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a kept result is that of the file as it is now, looked at as closely as asked."""
    # A process may have died for want of memory: that file deserves another chance.
    if any(finding["code"] == "crashed" for finding in entry["findings"]):
        return False
    same = all(entry[key] == wanted[key] for key in ("path", "size", "mtime_ns"))
    had, asked = entry["checks"], wanted["checks"]
    return same and {**had, "fast": asked["fast"]} == asked and had["fast"] <= asked["fast"]


def printable(path: str | os.PathLike[str]) -> str:
    """A path as text that can be printed and written; bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_report(path: Path) -> list[dict[str, Any]]:
    """Results of an earlier report; none if there is none.

    Raises
    ------
    OmniMemError
        There is another file of that name, which would be overwritten.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return [entry for entry in report["files"] if set(entry) >= KEYS]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OmniMemError(f"cannot read {path}: {error.strerror}; name another file with --report") from error
    except (ValueError, KeyError, TypeError) as error:
        raise OmniMemError(f"{path} is not a report of omnimem data validate; name another with --report") from error


class Journal:
    """Results of a run under way, one line each beside the report; removed with `finish`."""

    def __init__(self, report: Path) -> None:
        self.path = report.with_name(f"{report.stem}.partial.jsonl")
        self.entries = self._read()
        try:
            # Unbuffered: what a full disk did not take must not be written once more on closing.
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise OmniMemError(f"cannot write {self.path}: {error.strerror}; name a place with --report") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, entry: dict[str, Any]) -> None:
        """Keep a result, now."""
        with explained_disk_errors(self.path):
            # A line of its own even after a line that a killed run left unfinished.
            self._file.write(b"\n" + json.dumps(entry, ensure_ascii=False).encode() + b"\n")

    def finish(self) -> None:
        """The report is written: the journal is no longer needed."""
        self._file.close()
        self.path.unlink(missing_ok=True)  # another run of the same command may have finished first

    def _read(self) -> list[dict[str, Any]]:
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise OmniMemError(f"cannot read {self.path}: {error.strerror}; name a place with --report") from error
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:  # empty, or cut off when the run was killed
                continue
        return [entry for entry in entries if isinstance(entry, dict) and set(entry) >= KEYS]

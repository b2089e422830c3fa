"""Results saved between runs: the report, and the journal of an unfinished run.

A result is reused if path, size and modification time of the file and the versions of the checks, PyAV and FFmpeg are
the same; a result of full decoding is also reused under `--fast`.
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

VERSION = 3  # of the checks and of the entries: results of another version are not reused

KEYS = {"path", "size", "mtime_ns", "checks", "findings"}  # every valid entry has them


def file_identity(path: Path, fast: bool) -> dict[str, Any]:
    """The file and the checks a result belongs to; a missing file has size -1."""
    try:
        stat = path.stat()
        size, modified = stat.st_size, stat.st_mtime_ns
    except OSError:
        size, modified = -1, 0
    checks = {"version": VERSION, "av": av.__version__, "ffmpeg": av.ffmpeg_version_info, "fast": fast}
    return {"path": printable(path), "size": size, "mtime_ns": modified, "checks": checks}


def is_reusable(entry: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a saved result is valid for the unchanged file and at least as thorough as requested."""
    # The process may have died from lack of memory: check the file again.
    if any(finding["code"] == "crashed" for finding in entry["findings"]):
        return False
    same = all(entry[key] == wanted[key] for key in ("path", "size", "mtime_ns"))
    had, wants = entry["checks"], wanted["checks"]
    same_versions = {**had, "fast": wants["fast"]} == wants
    thorough_enough = wants["fast"] or not had["fast"]
    return same and same_versions and thorough_enough


def printable(path: str | os.PathLike[str]) -> str:
    """A path as printable text; bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_report(path: Path) -> list[dict[str, Any]]:
    """Results of an earlier report; an empty list if there is no report.

    Raises
    ------
    OmniMemError
        The file is not a report and would be overwritten.
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
    """Results of an unfinished run, one line each, in a file next to the report; `finish` deletes it."""

    def __init__(self, report: Path) -> None:
        self.path = report.with_name(f"{report.stem}.partial.jsonl")
        self.entries = self._read()
        try:
            # Unbuffered: after a write that failed on a full disk, closing must not try to write again.
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise OmniMemError(f"cannot write {self.path}: {error.strerror}; choose another --report") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, entry: dict[str, Any]) -> None:
        """Append a result and write it at once."""
        with explained_disk_errors(self.path):
            # The leading newline separates it from an unfinished line of a killed run.
            self._file.write(b"\n" + json.dumps(entry, ensure_ascii=False).encode() + b"\n")

    def finish(self) -> None:
        """Delete the journal, once the report is written."""
        self._file.close()
        self.path.unlink(missing_ok=True)  # a parallel run of the same command may have deleted it

    def _read(self) -> list[dict[str, Any]]:
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise OmniMemError(f"cannot read {self.path}: {error.strerror}; choose another --report") from error
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:  # empty, or truncated when the run was killed
                continue
        return [entry for entry in entries if isinstance(entry, dict) and set(entry) >= KEYS]

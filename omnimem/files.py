"""Atomic writes: write to a temporary name in the target's folder, flush to disk, rename.

A run that is interrupted or fills the disk must not leave a partial checkpoint that a resumed run takes for a complete
one. All files that are read again later are written with these functions:

    with atomic_directory("runs/quickstart/merged") as folder:
        model.save_pretrained(folder)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omnimem.errors import OmniMemError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

LEFTOVER = re.compile(r"\..*\.[0-9a-f]{8}\.(tmp.*|old)")
"""Names of unfinished writes (see `_sibling`)."""


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` in UTF-8; `path` always has either the old or the new content."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def atomic_write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` to `path` as indented JSON.

    Raises
    ------
    ValueError
        `obj` contains NaN or an infinity, which JSON cannot represent. Nothing is written.
    """
    atomic_write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` if the block succeeds.

    Parent folders are created. The temporary name has the suffix of `path`, because some writers choose their format by
    it. A symbolic link is resolved: the file it points to is replaced, not the link.

    Raises
    ------
    OmniMemError
        `path` is a folder, cannot be written, or the disk is full. The temporary file is deleted.
    """
    target = Path(os.path.realpath(path))
    temporary = _sibling(target, "tmp" + target.suffix)
    with _explained(path, temporary):
        if target.is_dir():
            raise OmniMemError(f"cannot write {path}: it is a folder; name a file")
        _make_parents(path, target)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(target.parent)


@contextmanager
def atomic_directory(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a new temporary folder next to `path`; rename it to `path` if the block succeeds.

    Parameters
    ----------
    path : path
        The folder to create. It may exist if it is empty. A symbolic link is resolved.
    overwrite : bool
        Replace a folder that is not empty. The old content stays at `path` until the new one is complete.

    Raises
    ------
    OmniMemError
        `path` is a file, is not empty and `overwrite` is off, contains the working or the home folder, cannot be
        written, or the disk is full. The temporary folder is deleted.
    """
    target = Path(os.path.realpath(path))
    temporary, old = _sibling(target, "tmp"), _sibling(target, "old")
    with _explained(path, temporary):
        _check_directory(path, target, overwrite)
        _make_parents(path, target)
        temporary.mkdir()
        try:
            yield temporary
            _sync_tree(temporary)
            # Checked again: the block may have run for an hour, and files that appeared since must not be deleted.
            _check_directory(path, target, overwrite)
            _swap(temporary, target, old)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(target.parent)
        if old.exists():
            shutil.rmtree(old)


def remove_directory(path: str | os.PathLike[str]) -> None:
    """Delete a folder atomically: rename it to a hidden name, then delete that."""
    hidden = _sibling(Path(path), "old")
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Delete temporary files and folders of killed processes directly inside `folder`."""
    for path in Path(folder).glob(".*"):
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def explained_disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise a one-line error if the disk is full while the block appends to `path`."""
    with _explained(path, Path(path)):
        yield


def _sibling(target: Path, ending: str) -> Path:
    """Return an unused hidden name in the folder of `target`: a rename is atomic only within one file system."""
    # The name is truncated, so that a long legal name does not become an illegal one.
    return target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex[:8]}.{ending}")


def _check_directory(path: str | os.PathLike[str], target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OmniMemError(f"cannot write the folder {path}: a file of that name exists")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise OmniMemError(f"{path} exists and is not empty; choose another folder or pass --overwrite")
    # A mistyped `--overwrite --out ~` must not delete the user's files.
    for folder, name in ((Path.cwd(), "working"), (Path.home(), "home")):
        if Path(os.path.realpath(folder)).is_relative_to(target):
            raise OmniMemError(f"refusing to overwrite {path}: it contains your {name} folder; choose another folder")


def _make_parents(path: str | os.PathLike[str], target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise OmniMemError(f"cannot write {path}: {error.filename}: {error.strerror}") from error


def _swap(new: Path, target: Path, old: Path) -> None:
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
        raise


def _sync(path: Path) -> None:
    """Flush a file or folder to disk: if the rename reached the disk first, a crash would leave an empty file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))


@contextmanager
def _explained(path: str | os.PathLike[str], temporary: Path) -> Iterator[None]:
    """Turn a full disk, and a failure to write the temporary path, into a one-line error about `path`."""
    try:
        yield
    except OmniMemError:
        raise
    except OSError as error:
        if error.errno in DISK_FULL:
            raise OmniMemError(_no_space(path)) from error
        # An OSError about another file (such as a missing input) is not a failure to write and is raised unchanged.
        if str(error.filename).startswith(str(temporary)):
            raise OmniMemError(f"cannot write {path}: {error.strerror}") from error
        raise
    except Exception as error:
        # Writers in Rust (safetensors, tokenizers) raise their own exceptions, which have the cause only in their text.
        if "os error 28" in str(error) or os.strerror(errno.ENOSPC) in str(error):
            raise OmniMemError(_no_space(path)) from error
        raise


def _no_space(path: str | os.PathLike[str]) -> str:
    free = 0
    with suppress(OSError):
        parent = next(p for p in Path(os.path.realpath(path)).parents if p.exists())
        free = shutil.disk_usage(parent).free
    return (
        f"cannot write {path}: no space left on the disk ({free / 2**20:.0f} MiB free); "
        "no partial file was left; free some space or choose another folder"
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()

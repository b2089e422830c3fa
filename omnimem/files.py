"""Output that is either complete or absent: write beside the target, flush to disk, rename into place.

A run that is interrupted, or that fills the disk, must not leave half a checkpoint which a resumed run or a
reader then takes for a whole one. Everything this project writes for later use goes through one of these:

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
"""Names of unfinished writes, as `_sibling` makes them."""


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` in UTF-8; `path` holds the old content or the new, never a part of either."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def atomic_write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` to `path` as indented JSON.

    Raises
    ------
    ValueError
        `obj` holds NaN or an infinity, which JSON cannot say. Nothing is written.
    """
    atomic_write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; move it onto `path` if the block succeeds.

    Parent folders are made. The temporary name keeps the suffix of `path`, because some writers choose their
    format by it. A symbolic link is followed, so that the link stays a link.

    Raises
    ------
    OmniMemError
        `path` is a folder, cannot be written, or the disk is full. The temporary file is gone.
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
    """Yield a new temporary folder beside `path`; rename it onto `path` if the block succeeds.

    Parameters
    ----------
    path : path
        The folder to make. It may exist if it is empty. A symbolic link is followed.
    overwrite : bool
        Replace a folder that is not empty. Its old content stays at `path` until the new is complete.

    Raises
    ------
    OmniMemError
        `path` is a file, is not empty and `overwrite` is off, holds the working or the home folder, cannot be
        written, or the disk is full. The temporary folder is gone.
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
            # Looked at again: the block may have run for an hour; what appeared since is not ours to delete.
            _check_directory(path, target, overwrite)
            _swap(temporary, target, old)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(target.parent)
        if old.exists():
            shutil.rmtree(old)


def remove_directory(path: str | os.PathLike[str]) -> None:
    """Delete a folder so that it is there whole or not at all: renamed out of sight first, then emptied."""
    hidden = _sibling(Path(path), "old")
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Delete what a killed process left of its unfinished writes directly inside `folder`."""
    for path in Path(folder).glob(".*"):
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def explained_disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say in one line that the disk is full while `path` is appended to."""
    with _explained(path, Path(path)):
        yield


def _sibling(target: Path, ending: str) -> Path:
    """Return an unused hidden name beside `target`: a rename is atomic only inside one file system."""
    # The stem is cut so that a long legal name does not become an illegal one.
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
    # `--overwrite --out ~` is a slip of the keyboard; it must not cost somebody their files.
    for place, name in ((Path.cwd(), "working"), (Path.home(), "home")):
        if Path(os.path.realpath(place)).is_relative_to(target):
            raise OmniMemError(f"refusing to overwrite {path}: it holds your {name} folder; choose another")


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
    """Flush a file or a folder to disk: a rename that overtakes its data leaves an empty file on a crash."""
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
    """Turn a full disk, and a refusal that concerns our temporary path, into one line about `path`."""
    try:
        yield
    except OmniMemError:
        raise
    except OSError as error:
        if error.errno in DISK_FULL:
            raise OmniMemError(_no_space(path)) from error
        # An OSError about some other file (an input that is missing) is not a failure to write: it passes.
        if str(error.filename).startswith(str(temporary)):
            raise OmniMemError(f"cannot write {path}: {error.strerror}") from error
        raise
    except Exception as error:
        # Writers in Rust (safetensors, tokenizers) raise a class of their own that only words the cause.
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
        "nothing was left behind, free some space or choose another folder"
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file of any size, a block at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()

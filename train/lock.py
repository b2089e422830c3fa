"""One run at a time in an output folder: a lock file that names its owner, and how to tell that the owner is dead.

The main process of a run holds ``<output_dir>/run.lock`` for as long as it lives and deletes it at the end. A process
that was killed leaves the file behind, so a lock counts only while its owner lives. On the same machine the process
table says so: process id and start time. The processes of another machine (or of another container) cannot be seen;
there the owner sets the time of the file again every few seconds, and is dead when that stops.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

import psutil

from omnimem.errors import OmniMemError

LOCK_FILE = "run.lock"

HEARTBEAT_SECONDS = 15.0
SILENCE_SECONDS = 180.0
"""An owner on another machine that has not set the file's time for so long is dead."""

log = logging.getLogger("omnimem.train")


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes
    ----------
    host : str
        Name of its machine.
    processes : str
        Where its process id is valid: a container has process ids of its own.
    pid : int
        Process id.
    started : float
        When the process started, in seconds after the machine did, which tells it from a later process of the same id.
    since : str
        When it took the lock, for people to read.
    """

    host: str
    processes: str
    pid: int
    started: float
    since: str

    @classmethod
    def current(cls) -> Owner:
        """Return the owner that this process is."""
        namespace = ""
        with suppress(OSError):  # only Linux has it
            namespace = os.readlink("/proc/self/ns/pid")
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        return cls(platform.node(), namespace, os.getpid(), _started(os.getpid()) or 0.0, now)

    def is_local_to(self, other: Owner) -> bool:
        """Whether the two processes see each other."""
        return (self.host, self.processes) == (other.host, other.processes)

    def is_running(self) -> bool:
        """Whether a process of this machine is still this one."""
        started = _started(self.pid)
        return started is not None and abs(started - self.started) < 2  # psutil rounds the boot time to seconds


@contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Make a folder and hold its lock during the block; a lock whose owner is dead is taken over.

    Parameters
    ----------
    folder : Path
        The output folder of a run.

    Raises
    ------
    OmniMemError
        Another run holds the lock, or the folder cannot be written. Nothing in it has changed.
    """
    path, owner = folder / LOCK_FILE, Owner.current()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(path, owner)
    except OSError as error:
        raise OmniMemError(f"output_dir {folder}: {error.strerror}") from error
    ended = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        ended.set()
        heartbeat.join()
        _release(path, owner)


def _take(path: Path, owner: Owner) -> None:
    """Write `owner` into the lock file as soon as no living process holds it."""
    began, first = time.monotonic(), None
    while True:
        with _opened(path) as file:
            holder, beat = _holder(file), os.fstat(file.fileno()).st_mtime
            local = holder is not None and holder.is_local_to(owner)
            # Watched as well, because the clocks of two machines may differ.
            silent = max(time.time() - beat, time.monotonic() - began) > SILENCE_SECONDS
            alive = holder is not None and (holder.is_running() if local else first is not None and beat != first)
            if holder is None or (not alive and (local or silent)):
                return _write(file, owner)
        used = f"{path.parent} is in use by a run on {holder.host}, process {holder.pid}, since {holder.since}"
        if alive:
            hint = "" if local else f" (if that job is gone, delete {path})"
            raise OmniMemError(f"{used}; wait for it, stop it, or give another output_dir{hint}")
        if first is None:
            first = beat
            log.warning("%s; waiting for a sign of life, at most %.0f s", used, SILENCE_SECONDS)
        time.sleep(1)


def _release(path: Path, owner: Owner) -> None:
    """Delete the lock file, unless it has become another's."""
    with suppress(OSError), _opened(path) as file:
        if _holder(file) in (owner, None):
            path.unlink()


def _beat(path: Path, ended: threading.Event) -> None:
    """Set the file's time again and again; an error of the file system may pass."""
    while not ended.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """Open the lock file, made if missing, for one process at a time."""
    while True:
        file = path.open("a+", encoding="utf-8")
        with suppress(OSError):  # a file system without locks: two runs that start in the same instant go unnoticed
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # its owner has just deleted it
    with file:
        yield file


def _holder(file: IO[str]) -> Owner | None:
    """Who is named in the file; None in a new one, or where a process died while it wrote its name."""
    file.seek(0)
    try:
        return Owner(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def _write(file: IO[str], owner: Owner) -> None:
    file.truncate(0)
    file.write(json.dumps(asdict(owner)) + "\n")


def _started(pid: int) -> float | None:
    """When a process of this machine started, in seconds after the machine did; None if there is none."""
    try:
        process = psutil.Process(pid)
        ended = process.status() == psutil.STATUS_ZOMBIE
        return None if ended else process.create_time() - psutil.boot_time()
    except psutil.Error:
        return None

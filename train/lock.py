"""Lock of an output folder: one run at a time; the lock of a dead process is taken over.

The main process of a run creates ``<output_dir>/run.lock`` and deletes it at the end. A killed process leaves the
file, so a lock is valid only while its owner runs. An owner on the same machine is looked up in the process table by
process id and start time. An owner on another machine or in another container is not visible there: it counts as dead
when it stops updating the file's modification time (`HEARTBEAT_SECONDS`).
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
"""An owner on another machine counts as dead after this long without an update."""

log = logging.getLogger("omnimem.train")


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes
    ----------
    host : str
        Name of its machine.
    pid_namespace : str
        Namespace of its process id: a container has its own.
    pid : int
        Process id.
    started : float
        Start of the process in seconds after boot, to distinguish it from a later process with the same id.
    since : str
        When it took the lock, for the error message.
    """

    host: str
    pid_namespace: str
    pid: int
    started: float
    since: str

    @classmethod
    def current(cls) -> Owner:
        """Describe this process."""
        namespace = ""
        with suppress(OSError):  # only Linux has it
            namespace = os.readlink("/proc/self/ns/pid")
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        return cls(platform.node(), namespace, os.getpid(), _started(os.getpid()) or 0.0, now)

    def is_local_to(self, other: Owner) -> bool:
        """Whether the two processes are on the same machine and in the same container."""
        return (self.host, self.pid_namespace) == (other.host, other.pid_namespace)

    def is_running(self) -> bool:
        """Whether this process, on this machine, still runs."""
        started = _started(self.pid)
        return started is not None and abs(started - self.started) < 2  # psutil rounds the boot time to seconds


@contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Create a folder and hold its lock during the block; take over the lock of a dead owner.

    Parameters
    ----------
    folder : Path
        The output folder of a run.

    Raises
    ------
    OmniMemError
        Another run holds the lock, or the folder cannot be written. The folder is unchanged.
    """
    path, owner = folder / LOCK_FILE, Owner.current()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(path, owner)
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


def _acquire(path: Path, owner: Owner) -> None:
    """Write `owner` into the lock file once no living process holds it."""
    began, first = time.monotonic(), None
    while True:
        with _opened(path) as file:
            holder, beat = _owner(file), os.fstat(file.fileno()).st_mtime
            local = holder is not None and holder.is_local_to(owner)
            # The clocks of two machines may differ, so the time since this process started to wait counts too.
            silent = max(time.time() - beat, time.monotonic() - began) > SILENCE_SECONDS
            alive = holder is not None and (holder.is_running() if local else first is not None and beat != first)
            if holder is None or (not alive and (local or silent)):
                return _write(file, owner)
        used = f"{path.parent} is in use by a run on {holder.host}, process {holder.pid}, since {holder.since}"
        if alive:
            hint = "" if local else f" (if that job is gone, delete {path})"
            raise OmniMemError(f"{used}; wait for it, stop it, or use another output_dir{hint}")
        if first is None:
            first = beat
            log.warning("%s; waiting up to %.0f s for an update of its lock", used, SILENCE_SECONDS)
        time.sleep(1)


def _release(path: Path, owner: Owner) -> None:
    """Delete the lock file unless another process has taken it over."""
    with suppress(OSError), _opened(path) as file:
        if _owner(file) in (owner, None):
            path.unlink()


def _beat(path: Path, ended: threading.Event) -> None:
    """Update the file's modification time regularly; file system errors may be temporary."""
    while not ended.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """Open the lock file exclusively; create it if missing."""
    while True:
        file = path.open("a+", encoding="utf-8")
        with suppress(OSError):  # no file locks here: two runs that start at the same moment are not detected
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # deleted by its owner in the meantime
    with file:
        yield file


def _owner(file: IO[str]) -> Owner | None:
    """Owner named in the file; None if it is new, or if a process died while writing it."""
    file.seek(0)
    try:
        return Owner(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def _write(file: IO[str], owner: Owner) -> None:
    file.truncate(0)
    file.write(json.dumps(asdict(owner)) + "\n")


def _started(pid: int) -> float | None:
    """Start of a process of this machine in seconds after boot; None if it does not run."""
    try:
        process = psutil.Process(pid)
        ended = process.status() == psutil.STATUS_ZOMBIE
        return None if ended else process.create_time() - psutil.boot_time()
    except psutil.Error:
        return None

"""Decode the clips of a manifest once, into a prepared folder that training reads instead of the original files.

    omnimem data prepare train.jsonl --to prepared --fps 2 --workers 16
    python train.py recipe=quickstart data.path=prepared data.fps=2

Each clip becomes one shard, named after its content (`shard_writer.py`): an interrupted run resumes with the missing
clips, and a manifest with additional clips only decodes those.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.decoded_clips.executors import EXECUTORS
from data_prep.decoded_clips.folder import (
    CLIPS_FOLDER,
    ROWS_FILE,
    SETTINGS_FILE,
    is_complete,
    is_prepared,
    read_records,
    read_settings,
)
from data_prep.decoded_clips.format import VERSION, ClipMetadata, PrepareSettings
from data_prep.decoded_clips.shard_writer import Prepared, RefusedClip, Task, prepare_clip, source, worker_died
from data_prep.manifest import Manifest, Row
from omnimem.errors import OmniMemError
from omnimem.files import atomic_file, atomic_write_json, remove_leftovers


@dataclass(frozen=True)
class Report:
    """Outcome of `prepare`.

    Attributes
    ----------
    clips, decoded : int
        Distinct clips of the usable rows, and how many of them this run decoded.
    seconds : float
        Total length of the clips.
    nbytes : int
        Total size of their shards.
    problems : list of str
        One line for each skipped row.
    """

    clips: int
    decoded: int
    seconds: float
    nbytes: int
    problems: list[str]


def prepare(
    manifest: Manifest,
    folder: str | os.PathLike[str],
    settings: PrepareSettings,
    *,
    clips: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    executor: str = "process",
    on_bad_row: str = "error",
    on_start: Callable[[int], None] = lambda total: None,
    on_clip: Callable[[Prepared | RefusedClip], None] = lambda outcome: None,
) -> Report:
    """Decode the clips of a manifest into a prepared folder; existing shards are reused.

    Parameters
    ----------
    manifest : Manifest
    folder : path
        Folder to write: settings, rows and, unless `clips` names another folder, the shards.
    settings : PrepareSettings
        How the clips are decoded and stored.
    clips : path, optional
        Folder of the shards, which several prepared folders may share.
    workers : int, optional
        Clips decoded in parallel. Default: the number of CPU cores.
    executor : {"process", "ray"}
        Decode in processes of this machine or on a Ray cluster.
    on_bad_row : {"error", "skip"}
        What to do about a damaged clip, once all other clips are decoded: write no rows, or skip its rows.
    on_start, on_clip : callable
        Called with the number of clips to decode, and then with the outcome of each.

    Raises
    ------
    OmniMemError
        A damaged clip under "error"; no usable clip; a folder with other content; a full disk.
    """
    folder = Path(os.path.realpath(folder))
    store = folder / CLIPS_FOLDER if clips is None else Path(os.path.realpath(clips))
    _check_folder(folder, store, settings)
    tasks = [_task(row, settings, store) for row in manifest.rows]  # rows with the same clip have equal tasks
    with _lock(store):
        known = _known_shards(folder, store)
        outcomes: dict[Task, Prepared | RefusedClip] = {
            task: known[key] for task in set(tasks) if (key := _task_key(task)) in known
        }
        missing = [task for task in dict.fromkeys(tasks) if task not in outcomes]
        on_start(len(missing))
        with closing(EXECUTORS[executor](prepare_clip, missing, workers)) as results:
            for task, outcome in results:
                outcomes[task] = outcome or worker_died(task)
                on_clip(outcomes[task])

    problems = list(manifest.problems)
    usable: list[tuple[Row, Prepared]] = []
    for row, task in zip(manifest.rows, tasks, strict=True):
        outcome = outcomes[task]
        if isinstance(outcome, Prepared):
            usable.append((row, outcome))
        else:
            problems.append(f"line {row.line}: {outcome.reason}")
    if len(usable) < len(manifest.rows) and on_bad_row == "error":
        first, more = problems[len(manifest.problems)], len(manifest.rows) - len(usable) - 1
        others = f"; {more} more bad rows" if more else ""
        raise OmniMemError(
            f"{first}{others} (--on-bad-row skip skips bad rows; the other clips are decoded and will be reused)"
        )
    if not usable:
        raise OmniMemError(f"no clip could be prepared; {problems[0]}")
    _check_folder(folder, store, settings)  # a second time: another run may have finished in the meantime
    _write_folder(folder, store, settings, usable, problems)
    distinct = {one.shard: one for _, one in usable}.values()
    return Report(
        clips=len(distinct),
        decoded=sum(not one.reused for one in distinct),
        seconds=sum(one.metadata.end for one in distinct),
        nbytes=sum(one.nbytes for one in distinct),
        problems=problems,
    )


def _write_folder(
    folder: Path, store: Path, settings: PrepareSettings, usable: list[tuple[Row, Prepared]], problems: list[str]
) -> None:
    with atomic_file(folder / ROWS_FILE) as temporary:
        lines = (json.dumps(_record(row, one, settings), ensure_ascii=False) + "\n" for row, one in usable)
        temporary.write_text("".join(lines), encoding="utf-8")
    # Last, because its presence marks the folder as complete.
    atomic_write_json(
        folder / SETTINGS_FILE,
        {
            "version": VERSION,
            "settings": asdict(settings),
            "clips": os.path.relpath(store, folder),
            "rows": len(usable),
            "problems": problems,
        },
    )


def _task(row: Row, settings: PrepareSettings, store: Path) -> Task:
    audio = settings.audio and row.audio
    return Task(row.media, row.audio_path if audio else None, replace(settings, audio=audio), store)


def _check_folder(folder: Path, store: Path, settings: PrepareSettings) -> None:
    """Refuse a folder with foreign content, and one that was prepared with other settings."""
    if is_prepared(folder):
        known, _ = read_settings(folder)
        if known.recorded() != settings.recorded():
            pairs = [(key, value, known.recorded().get(key)) for key, value in settings.recorded().items()]
            other = ", ".join(f"{key}={old} (now {new})" for key, new, old in pairs if new != old)
            raise OmniMemError(f"{folder} is prepared with {other}; choose another folder, or delete this one")
    elif folder.exists() and not folder.is_dir():
        raise OmniMemError(f"cannot write the folder {folder}: a file of that name exists")
    elif folder.is_dir() and not (folder / ROWS_FILE).is_file():
        foreign = [path.name for path in folder.iterdir() if path != store and not path.name.startswith(".")]
        if foreign:
            raise OmniMemError(f"{folder} holds other files ({foreign[0]}); choose a new or a prepared folder")


@contextmanager
def _lock(store: Path) -> Iterator[None]:
    """Hold a shared lock on the folder of shards while shards are written.

    Before that, delete the temporary files of killed runs, unless another run holds the lock.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        lock = (store / ".lock").open("w")
    except OSError as error:
        raise OmniMemError(f"cannot write {store}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_leftovers(store)
        except OSError:
            pass  # another run, or a file system without locks: delete nothing
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def _known_shards(folder: Path, store: Path) -> dict[str, Prepared]:
    """Shards of an earlier run with the same settings, by `_sources_key`."""
    found: dict[str, Prepared] = {}
    if is_prepared(folder):
        # In a partly copied folder, lines may be truncated. `prepare_clip` finds their shards by content.
        with suppress(OmniMemError, KeyError, TypeError):
            for known in read_records(folder):
                if is_complete(store / known["shard"], known["nbytes"]):
                    metadata = ClipMetadata.from_dict(known["clip"])
                    one = Prepared(known["shard"], known["nbytes"], known["sources"], metadata, reused=True)
                    found[_sources_key(known["sources"], known["has_audio"])] = one
    return found


def _task_key(task: Task) -> str:
    return _sources_key([source(path) for path in task.files], task.settings.audio)


def _sources_key(sources: list[dict[str, Any]], audio: bool) -> str:
    """Path, size and modification time of the source files, and whether audio is stored."""
    return json.dumps([[[one[key] for key in ("path", "size", "mtime_ns")] for one in sources], audio])


def _record(row: Row, prepared: Prepared, settings: PrepareSettings) -> dict[str, Any]:
    """A line of `rows.jsonl`."""
    return {
        "name": row.name,
        "line": row.line,
        "audio": row.audio,
        "questions": [asdict(question) for question in row.questions],
        "content": row.content(),
        "shard": prepared.shard,
        "nbytes": prepared.nbytes,
        "has_audio": settings.audio and row.audio,
        "sources": prepared.sources,
        "clip": asdict(prepared.metadata),
    }

"""Decode the clips of a manifest once, into a folder that training reads instead of them.

    omnimem data prepare train.jsonl --to prepared --fps 2 --workers 16
    python train.py recipe=quickstart data.path=prepared data.fps=2

A clip is a unit of work and gives one shard, named after its content (`data_prep/prepare/shard.py`); a run that was
killed goes on with the clips that are missing, and a manifest that grew costs its new clips only. What another run
should store instead of frames, such as the features of an encoder, is another kind of shard beside this one.
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

from data_prep.manifest import Manifest, Row
from data_prep.prepare.executors import EXECUTORS
from data_prep.prepare.shard import Prepared, Refused, Task, died, prepare_clip, source
from data_prep.prepared import (
    CLIPS,
    ROWS_FILE,
    SETTINGS_FILE,
    VERSION,
    ClipFacts,
    PrepareSettings,
    is_prepared,
    is_whole,
    read_records,
    read_settings,
)
from omnimem.errors import OmniMemError
from omnimem.files import atomic_file, atomic_write_json, sweep


@dataclass(frozen=True)
class Report:
    """What a preparation came to.

    Attributes
    ----------
    clips, made : int
        Different clips of the rows that are kept, and how many of them were decoded by this run.
    seconds : float
        Length of the clips.
    nbytes : int
        Size of their shards.
    problems : list of str
        One line for each row that was left out.
    """

    clips: int
    made: int
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
    began: Callable[[int], None] = lambda total: None,
    done: Callable[[Prepared | Refused], None] = lambda outcome: None,
) -> Report:
    """Prepare the clips of a manifest; what exists is not done again.

    Parameters
    ----------
    manifest : Manifest
        The rows.
    folder : path
        What is written: settings, rows and, unless `clips` says elsewhere, shards.
    settings : PrepareSettings
        How the clips are decoded and stored.
    clips : path, optional
        Folder of the shards, which several prepared folders may share.
    workers : int, optional
        Clips at work side by side; as many as there are CPU cores if not given.
    executor : {"process", "ray"}
        Who does the work.
    on_bad_row : {"error", "skip"}
        What happens when a clip is damaged: the others are prepared; then the rows are refused or written without it.
    began, done : callable
        Told how many clips are not known to be there, and then the outcome of each.

    Raises
    ------
    OmniMemError
        A damaged clip under "error"; no clip that can be used; a folder that holds something else; a full disk.
    """
    folder = Path(os.path.realpath(folder))
    store = folder / CLIPS if clips is None else Path(os.path.realpath(clips))
    _check_folder(folder, store, settings)
    tasks = [_task(row, settings, store) for row in manifest.rows]  # rows with the same clip have the same
    with _writing(store):
        known = _known(folder, store)
        outcomes: dict[Task, Prepared | Refused] = {
            task: known[seen] for task in set(tasks) if (seen := _seen(task)) in known
        }
        left = [task for task in dict.fromkeys(tasks) if task not in outcomes]
        began(len(left))
        with closing(EXECUTORS[executor](prepare_clip, left, workers)) as results:
            for task, outcome in results:
                outcomes[task] = outcome or died(task)
                done(outcomes[task])

    problems = list(manifest.problems)
    kept: list[tuple[Row, Prepared]] = []
    for row, task in zip(manifest.rows, tasks, strict=True):
        outcome = outcomes[task]
        if isinstance(outcome, Prepared):
            kept.append((row, outcome))
        else:
            problems.append(f"line {row.line}: {outcome.reason}")
    if len(kept) < len(manifest.rows) and on_bad_row == "error":
        first, more = problems[len(manifest.problems)], len(manifest.rows) - len(kept) - 1
        others = f"; {more} more bad rows" if more else ""
        raise OmniMemError(
            f"{first}{others} (--on-bad-row skip leaves bad rows out; the other clips are prepared and not done again)"
        )
    if not kept:
        raise OmniMemError(f"no clip could be prepared; {problems[0]}")
    _check_folder(folder, store, settings)  # once more: another run may have finished in it since
    with atomic_file(folder / ROWS_FILE) as temporary:
        lines = (json.dumps(_record(row, one, settings), ensure_ascii=False) + "\n" for row, one in kept)
        temporary.write_text("".join(lines), encoding="utf-8")
    # Last, because it is what makes the folder a prepared one.
    atomic_write_json(
        folder / SETTINGS_FILE,
        {
            "version": VERSION,
            "settings": asdict(settings),
            "clips": os.path.relpath(store, folder),
            "rows": len(kept),
            "problems": problems,
        },
    )
    different = {one.shard: one for _, one in kept}.values()
    return Report(
        clips=len(different),
        made=sum(not one.reused for one in different),
        seconds=sum(one.facts.end for one in different),
        nbytes=sum(one.nbytes for one in different),
        problems=problems,
    )


def _task(row: Row, settings: PrepareSettings, store: Path) -> Task:
    heard = settings.audio and row.audio
    return Task(row.media, row.sound if heard else None, replace(settings, audio=heard), store)


def _check_folder(folder: Path, store: Path, settings: PrepareSettings) -> None:
    """Refuse a folder that is not ours to write, or whose present content is in use with other settings."""
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
            raise OmniMemError(f"{folder} holds something else ({foreign[0]}); choose a new or a prepared folder")


@contextmanager
def _writing(store: Path) -> Iterator[None]:
    """Hold the folder of shards; what killed runs left in it is deleted unless another run is at work there."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        lock = (store / ".lock").open("w")
    except OSError as error:
        raise OmniMemError(f"cannot write {store}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sweep(store)
        except OSError:
            pass  # another run, or a file system without locks: nothing is deleted
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def _known(folder: Path, store: Path) -> dict[str, Prepared]:
    """What an earlier run with these settings prepared, by what its files looked like then."""
    found: dict[str, Prepared] = {}
    if is_prepared(folder):
        # Lines that are not whole are those of a copy that is not: their shards are found by content.
        with suppress(OmniMemError, KeyError, TypeError):
            for known in read_records(folder):
                if is_whole(store / known["shard"], known["nbytes"]):
                    facts = ClipFacts.of(known["clip"])
                    one = Prepared(known["shard"], known["nbytes"], known["sources"], facts, reused=True)
                    found[_look(known["sources"], known["heard"])] = one
    return found


def _seen(task: Task) -> str:
    return _look([source(path) for path in (task.media, task.sound) if path is not None], task.settings.audio)


def _look(sources: list[dict[str, Any]], heard: bool) -> str:
    return json.dumps([[[one[key] for key in ("path", "size", "mtime_ns")] for one in sources], heard])


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
        "heard": settings.audio and row.audio,
        "sources": prepared.sources,
        "clip": asdict(prepared.facts),
    }

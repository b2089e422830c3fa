"""One clip to one shard: the unit of work of `omnimem data prepare`, the same in a process and on a Ray worker.

A shard's name is a hash of the bytes it was made from and of how it was made, so that what exists is never made
again, whichever manifest asks for it. It appears under that name only when it is complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.prepared import FOOTER, FRAMES, INT16_SCALE, SOUND, VERSION, ClipFacts, PrepareSettings, read_footer
from omnimem.files import atomic_file, file_digest
from omnimem.media import Chunk, MediaError, MediaReader, open_media

SECONDS, MOST_FRAMES = 10, 32
"""Length of a row group, and the frames it has at most; a reader holds one."""

EDGE = 0.05
"""A clip must not end so shortly behind (seconds) the edge of a row group: its exact end would not be seen."""


@dataclass(frozen=True)
class Task:
    """A clip to prepare: its file, a file whose sound is heard instead of its own, and where the shard goes."""

    media: Path
    sound: Path | None
    settings: PrepareSettings
    clips: Path


@dataclass(frozen=True)
class Prepared:
    """A shard that is there, what it was made from, the facts about its clip, and whether it had been there before."""

    shard: str
    nbytes: int
    sources: list[dict[str, Any]]
    facts: ClipFacts
    reused: bool


@dataclass(frozen=True)
class Refused:
    """Why a clip cannot be used."""

    reason: str


def died(task: Task) -> Refused:
    """The outcome of a clip whose process died of it."""
    reason = "the process that read it died (a crash in a decoder, or no memory left: lower --workers)"
    return Refused(f"{task.media.name}: {reason}")


def prepare_clip(task: Task) -> Prepared | Refused:
    """Decode a clip into its shard, unless it is there; what is wrong with the clip is returned, not raised."""
    try:
        sources = [source(path) for path in (task.media, task.sound) if path is not None]
        for known in sources:
            known["digest"] = file_digest(Path(known["path"]))
    except OSError as error:
        return Refused(f"{task.media.name}: cannot be read: {error.strerror}")
    shard = shard_name([known["digest"] for known in sources], task.settings)
    path = task.clips / shard
    try:
        return Prepared(shard, path.stat().st_size, sources, read_footer(path)[1], reused=True)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not whole: it is written
    try:
        with atomic_file(path) as temporary:
            facts = write_shard(temporary, task)
    except MediaError as error:
        return Refused(str(error))
    return Prepared(shard, path.stat().st_size, sources, facts, reused=False)


def source(path: Path) -> dict[str, Any]:
    """What tells whether a file is still the same without reading it."""
    status = path.stat()
    return {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def shard_name(digests: list[str], settings: PrepareSettings) -> str:
    """Content address of a shard: of its sources (media, then sound) and of how they were decoded."""
    known = {"version": VERSION, "holds": "media", "sources": digests, **settings.recorded()}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest() + ".parquet"


def write_shard(path: Path, task: Task) -> ClipFacts:
    """Decode a clip into a Parquet file, a row group at a time.

    Raises
    ------
    MediaError
        The clip cannot be decoded to its end.
    """
    from pyarrow import Table
    from pyarrow.parquet import ParquetWriter

    settings = task.settings
    reader, instants, samples, shape, end = _open(task), 0, 0, None, 0.0
    schema = _features(settings).arrow_schema
    with ParquetWriter(path, schema, **_coding(settings)) as writer:
        for chunk in reader:
            writer.write_table(Table.from_pydict(_row(chunk, settings), schema=schema))
            instants += len(chunk.frames)
            samples += 0 if chunk.audio is None else len(chunk.audio)
            shape, end = chunk.frames.shape[1:3], chunk.t1
        facts = ClipFacts(
            info=replace(reader.info, path=task.media.name),
            instants=instants,
            shape=shape if shape != (0, 0) else None,
            samples=None if reader.info.audio_index is None else samples,
            end=end,
        )
        known = {"version": VERSION, "settings": asdict(settings), "clip": asdict(facts)}
        writer.add_key_value_metadata({FOOTER: json.dumps(known)})
    return facts


def _open(task: Task) -> MediaReader:
    settings = task.settings

    def reader(seconds: float) -> MediaReader:
        return open_media(
            task.media,
            audio_path=task.sound,
            fps=settings.fps,
            chunk_seconds=seconds,
            audio=settings.audio,
            short_side=settings.short_side,
            max_seconds=settings.max_seconds,
        )

    lengths = list(group_lengths(settings.fps))
    opened = reader(lengths[0])
    duration = opened.info.duration
    if duration is None:
        return opened
    clear = (length for length in lengths if (duration + EDGE / 2) % length >= EDGE)
    length = next(clear, lengths[0])
    return opened if length == lengths[0] else reader(length)


def group_lengths(fps: float) -> Iterator[float]:
    """Seconds a row group may have: about `SECONDS`, a whole number of frames, and not too many."""
    count = max(1, min(MOST_FRAMES, math.ceil(SECONDS * fps)))
    for frames in range(count, count + 4):
        yield frames / fps


def _features(settings: PrepareSettings) -> Any:
    from datasets import Features, Image, List, Value

    return Features(
        {
            "index": Value("int32"),
            "t0": Value("float64"),
            "t1": Value("float64"),
            "times": List(Value("float64")),
            FRAMES: List(Image()),
            SOUND: List(Value(settings.sound)),
        }
    )


def _coding(settings: PrepareSettings) -> dict[str, Any]:
    """Options of the Parquet writer: pictures are compressed already, samples are not."""
    samples = f"{SOUND}.list.element"
    # Floats hardly compress as they are; their exponents do when they stand side by side.
    split = {"column_encoding": {samples: "BYTE_STREAM_SPLIT"}} if settings.sound == "float32" else {}
    return {"compression": {samples: "zstd"}, "use_dictionary": False, "write_page_checksum": True, **split}


def _row(chunk: Chunk, settings: PrepareSettings) -> dict[str, list[Any]]:
    """One row group of one row."""
    return {
        "index": [chunk.index],
        "t0": [chunk.t0],
        "t1": [chunk.t1],
        "times": [chunk.frame_times],
        FRAMES: [[{"bytes": _picture(frame, settings), "path": None} for frame in chunk.frames]],
        SOUND: [_sound(chunk.audio, settings)],
    }


def _picture(frame: np.ndarray, settings: PrepareSettings) -> bytes:
    """uint8 ``[H, W, 3]`` as the bytes of a picture file."""
    from PIL import Image

    # The least effort of the exact formats costs a tenth in size and saves three quarters of the time.
    options: dict[str, Any] = {
        "webp": {"lossless": True, "quality": 0, "method": 0},
        "png": {"compress_level": 1},
        "jpeg": {"quality": settings.quality},
    }[settings.frames]
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, settings.frames.upper(), **options)
    return buffer.getvalue()


def _sound(samples: np.ndarray | None, settings: PrepareSettings) -> np.ndarray:
    if samples is None:
        return np.zeros(0, settings.sound)
    if settings.sound == "int16":
        return np.clip(np.round(samples * INT16_SCALE), -INT16_SCALE, INT16_SCALE - 1).astype(np.int16)
    return samples

"""Decode one clip into one shard: the unit of work of `omnimem data prepare`, on a local process or a Ray worker.

A shard is named by a hash of its source files' content and of its settings, so an existing shard is never written
again, whichever manifest asks for it. It gets that name only when it is complete.
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

from data_prep.decoded_clips.format import (
    AUDIO,
    FOOTER,
    FRAMES,
    INT16_SCALE,
    VERSION,
    ClipMetadata,
    PrepareSettings,
    read_footer,
)
from omnimem.files import atomic_file, file_digest
from omnimem.media import Chunk, MediaError, MediaReader, open_media

ROW_GROUP_SECONDS, ROW_GROUP_FRAMES = 10, 32
"""Length of a row group and its largest number of frames; a reader holds one row group in memory."""

EDGE_SECONDS = 0.05
"""Seconds. A clip that ends just after the edge of a row group would lose its exact end; another length is chosen if
the stated end is less than half of this before or after an edge."""


@dataclass(frozen=True)
class Task:
    """A clip to decode: its file, a separate audio file if any, the settings, and the folder of the shards."""

    media: Path
    audio_path: Path | None
    settings: PrepareSettings
    clips: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """The source files: media, then audio."""
        return (self.media,) if self.audio_path is None else (self.media, self.audio_path)


@dataclass(frozen=True)
class Prepared:
    """A complete shard.

    Attributes
    ----------
    shard : str
        File name.
    nbytes : int
        File size.
    sources : list of dict
        `source` of each file it was made from, with its ``digest``.
    metadata : ClipMetadata
    reused : bool
        Whether it existed before this run.
    """

    shard: str
    nbytes: int
    sources: list[dict[str, Any]]
    metadata: ClipMetadata
    reused: bool


@dataclass(frozen=True)
class RefusedClip:
    """Why a clip cannot be used."""

    reason: str


def worker_died(task: Task) -> RefusedClip:
    """The outcome of a clip whose worker process died."""
    reason = "the worker process that decoded it died (a crash in a decoder, or out of memory: lower --workers)"
    return RefusedClip(f"{task.media.name}: {reason}")


def prepare_clip(task: Task) -> Prepared | RefusedClip:
    """Decode a clip into its shard unless the shard exists; errors of the clip are returned, not raised."""
    try:
        sources = [source(path) for path in task.files]
        for known in sources:
            known["digest"] = file_digest(Path(known["path"]))
    except OSError as error:
        return RefusedClip(f"{task.media.name}: cannot be read: {error.strerror}")
    shard = shard_name([known["digest"] for known in sources], task.settings)
    path = task.clips / shard
    try:
        return Prepared(shard, path.stat().st_size, sources, read_footer(path)[1], reused=True)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing or incomplete: it is written
    try:
        with atomic_file(path) as temporary:
            metadata = write_shard(temporary, task)
    except MediaError as error:
        return RefusedClip(str(error))
    return Prepared(shard, path.stat().st_size, sources, metadata, reused=False)


def source(path: Path) -> dict[str, Any]:
    """What identifies an unchanged file without reading its content."""
    status = path.stat()
    return {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def shard_name(digests: list[str], settings: PrepareSettings) -> str:
    """File name of a shard: a hash of its source digests (media, then audio) and its settings."""
    known = {"version": VERSION, "holds": "media", "sources": digests, **settings.recorded()}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest() + ".parquet"


def write_shard(path: Path, task: Task) -> ClipMetadata:
    """Decode a clip into a Parquet file, one row group at a time.

    Raises
    ------
    MediaError
        The clip cannot be decoded to its end.
    """
    from pyarrow import Table
    from pyarrow.parquet import ParquetWriter

    settings = task.settings
    reader, num_frames, num_samples, frame_size, end = _open(task), 0, 0, None, 0.0
    schema = _features(settings).arrow_schema
    with ParquetWriter(path, schema, **_encoding(settings)) as writer:
        for chunk in reader:
            writer.write_table(Table.from_pydict(_row(chunk, settings), schema=schema))
            num_frames += len(chunk.frames)
            num_samples += 0 if chunk.audio is None else len(chunk.audio)
            frame_size, end = chunk.frames.shape[1:3], chunk.t1
        metadata = ClipMetadata(
            info=replace(reader.info, path=task.media.name),
            num_frames=num_frames,
            frame_size=frame_size if frame_size != (0, 0) else None,
            num_samples=None if reader.info.audio_index is None else num_samples,
            end=end,
        )
        known = {"version": VERSION, "settings": asdict(settings), "clip": asdict(metadata)}
        writer.add_key_value_metadata({FOOTER: json.dumps(known)})
    return metadata


def _open(task: Task) -> MediaReader:
    """A reader whose chunks are row groups. It avoids lengths with an edge near the clip's end (`EDGE_SECONDS`)."""
    settings = task.settings

    def reader(seconds: float) -> MediaReader:
        return open_media(
            task.media,
            audio_path=task.audio_path,
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
    clear = (length for length in lengths if (duration + EDGE_SECONDS / 2) % length >= EDGE_SECONDS)
    length = next(clear, lengths[0])
    return opened if length == lengths[0] else reader(length)


def group_lengths(fps: float) -> Iterator[float]:
    """Candidate lengths of a row group in seconds: each a whole number of frames."""
    count = max(1, min(ROW_GROUP_FRAMES, math.ceil(ROW_GROUP_SECONDS * fps)))
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
            AUDIO: List(Value(settings.audio_dtype)),
        }
    )


def _encoding(settings: PrepareSettings) -> dict[str, Any]:
    """Options of the Parquet writer: frames are compressed already, samples are not."""
    samples = f"{AUDIO}.list.element"
    # Floats compress badly as they are, and well once their exponent bytes are stored next to each other.
    split = {"column_encoding": {samples: "BYTE_STREAM_SPLIT"}} if settings.audio_dtype == "float32" else {}
    return {"compression": {samples: "zstd"}, "use_dictionary": False, "write_page_checksum": True, **split}


def _row(chunk: Chunk, settings: PrepareSettings) -> dict[str, list[Any]]:
    """One row group, which has one row."""
    return {
        "index": [chunk.index],
        "t0": [chunk.t0],
        "t1": [chunk.t1],
        "times": [chunk.frame_times],
        FRAMES: [[{"bytes": _encode_frame(frame, settings), "path": None} for frame in chunk.frames]],
        AUDIO: [_encode_audio(chunk.audio, settings)],
    }


def _encode_frame(frame: np.ndarray, settings: PrepareSettings) -> bytes:
    """A frame, uint8 ``[H, W, 3]``, as the bytes of an image file."""
    from PIL import Image

    # The fastest setting of the exact formats costs a tenth in size and saves three quarters of the time.
    options: dict[str, Any] = {
        "webp": {"lossless": True, "quality": 0, "method": 0},
        "png": {"compress_level": 1},
        "jpeg": {"quality": settings.jpeg_quality},
    }[settings.frame_format]
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, settings.frame_format.upper(), **options)
    return buffer.getvalue()


def _encode_audio(samples: np.ndarray | None, settings: PrepareSettings) -> np.ndarray:
    if samples is None:
        return np.zeros(0, settings.audio_dtype)
    if settings.audio_dtype == "int16":
        return np.clip(np.round(samples * INT16_SCALE), -INT16_SCALE, INT16_SCALE - 1).astype(np.int16)
    return samples

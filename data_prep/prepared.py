"""A prepared folder: clips decoded once, what is known about them, and the rows of the manifest they came from.

    prepared/prepared.json     how the clips were decoded
    prepared/rows.jsonl        the rows of the manifest, each with the facts about its clip and the name of its shard
    prepared/clips/….parquet   one clip a shard; a row group is some seconds: frames as pictures, sound as samples

Nothing of a shard depends on a model or on the length of chunks: any `chunk_seconds` is cut from it, and every frame
rate that divides the prepared one. The original files need not be there. Shards are typed by `datasets`, so that
``load_dataset("parquet", data_files="prepared/clips/*.parquet", streaming=True)`` reads them, too.

    python -c "from data_prep.prepared import read_prepared as r; [print(row.name) for row in r('prepared').rows]"
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from data_prep.manifest import Manifest, Question, Row
from omnimem.errors import OmniMemError
from omnimem.media import MediaInfo

VERSION = 1
SETTINGS_FILE, ROWS_FILE, CLIPS = "prepared.json", "rows.jsonl", "clips"
FRAMES, SOUND = "frames", "sound"  # columns of a shard
FOOTER = b"omnimem"  # key of the footer's metadata under which the facts about a clip are
INT16_SCALE = 32768  # the one of FFmpeg, so that 16-bit sound of 16 kHz comes back exactly

log = logging.getLogger("omnimem.data")


@dataclass(frozen=True)
class PrepareSettings:
    """How clips are decoded and stored.

    Attributes
    ----------
    fps : float
        Frames a second.
    short_side : int or None
        Frames are scaled down to this shorter side; None keeps them.
    max_seconds : float or None
        Clips end here.
    audio : bool
        Whether sound is stored.
    frames : {"webp", "png", "jpeg"}
        The first two are exact, ``webp`` (lossless) takes less; ``jpeg`` of `quality` loses something.
    quality : int
        Of JPEG, 1 to 95.
    sound : {"float32", "int16"}
        The first is exact.
    """

    fps: float = 1.0
    short_side: int | None = 360
    max_seconds: float | None = None
    audio: bool = True
    frames: Literal["webp", "png", "jpeg"] = "webp"
    quality: int = 90
    sound: Literal["float32", "int16"] = "float32"

    @property
    def exact(self) -> bool:
        """Whether what is read back is what was decoded."""
        return self.frames != "jpeg" and self.sound == "float32"

    def recorded(self) -> dict[str, Any]:
        """What a shard depends on, in one way of writing it."""
        known = {**asdict(self), "fps": float(self.fps)}
        known["max_seconds"] = None if self.max_seconds is None else float(self.max_seconds)
        if self.frames != "jpeg":
            del known["quality"]
        return known


@dataclass(frozen=True)
class ClipFacts:
    """What is known about a clip without reading it.

    Attributes
    ----------
    info : MediaInfo
        As `MediaReader` says it of the original.
    instants : int
        Frames stored.
    shape : tuple of int or None
        Height and width of the frames; None without picture.
    samples : int or None
        Samples of sound stored; None when no sound was read.
    end : float
        Second at which the clip ends, or at which `max_seconds` cut it.
    """

    info: MediaInfo
    instants: int
    shape: tuple[int, int] | None
    samples: int | None
    end: float

    @classmethod
    def of(cls, known: dict[str, Any]) -> ClipFacts:
        """Read what `asdict` and JSON made of it."""
        shape = None if known["shape"] is None else tuple(known["shape"])
        return cls(**{**known, "info": MediaInfo.of(known["info"]), "shape": shape})


@dataclass(frozen=True, kw_only=True)
class PreparedRow(Row):
    """A row whose `media` is a shard.

    Attributes
    ----------
    info : MediaInfo
        Of the original.
    original : list
        What the row of the manifest adds to its fingerprint.
    """

    info: MediaInfo
    original: list[Any]

    def content(self) -> list[Any]:
        """As the original, so that a run may go on from the one or the other."""
        return self.original


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether it is a prepared folder, complete."""
    return Path(path, SETTINGS_FILE).is_file()


def read_settings(folder: str | os.PathLike[str]) -> tuple[PrepareSettings, Path]:
    """How the clips of a prepared folder were decoded, and the folder of its shards.

    Raises
    ------
    OmniMemError
        Not a prepared folder, or one of another version.
    """
    file = Path(folder, SETTINGS_FILE)
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["version"] != VERSION:
            raise OmniMemError(
                f"{folder}: prepared in format {known['version']}, and this is {VERSION}; delete it and prepare again"
            )
        return PrepareSettings(**known["settings"]), Path(os.path.realpath(folder), known["clips"])
    except OSError as error:
        raise OmniMemError(f"{folder}: not a prepared folder ({error.strerror}: {SETTINGS_FILE})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise OmniMemError(
            f"{file}: not what `omnimem data prepare` wrote ({error}); delete it, prepare again"
        ) from error


def read_prepared(folder: str | os.PathLike[str], on_bad_row: str = "error") -> Manifest:
    """Read the rows of a prepared folder; opens no clip.

    Parameters
    ----------
    folder : path
        What `omnimem data prepare` wrote.
    on_bad_row : {"error", "skip"}
        What is done about a row whose shard is missing or cut off.

    Raises
    ------
    OmniMemError
        Not a prepared folder; such a shard under "error"; no row.
    """
    _, clips = read_settings(folder)
    rows: list[Row] = []
    problems: list[str] = []
    for known in read_records(folder):
        try:
            row = PreparedRow(
                media=clips / known["shard"],
                questions=tuple(Question(**question) for question in known["questions"]),
                audio=known["audio"],
                line=known["line"],
                name=known["name"],
                info=replace(ClipFacts.of(known["clip"]).info, path=known["name"]),
                original=known["content"],
            )
            nbytes = known["nbytes"]
        except (KeyError, TypeError) as error:
            raise OmniMemError(
                f"{Path(folder, ROWS_FILE)}: not what `omnimem data prepare` wrote ({error}); prepare again"
            ) from error
        if is_whole(row.media, nbytes):
            rows.append(row)
        else:
            problems.append(
                f"{folder}:{row.line}: {row.name}: its shard {row.media} is missing or cut off; prepare again"
            )
    for problem in problems:
        if on_bad_row == "error":
            raise OmniMemError(f"{problem} (data.on_bad_row=skip leaves it out)")
        log.warning("row skipped: %s", problem)
    if not rows:
        raise OmniMemError(f"{folder}: no row in it; {problems[0] if problems else 'prepare again'}")
    return Manifest(rows, problems)


def read_records(folder: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The lines of `rows.jsonl`."""
    file = Path(folder, ROWS_FILE)
    try:
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    except (OSError, ValueError) as error:
        raise OmniMemError(f"{file}: cannot be read ({error}); prepare again") from error


def frame_step(
    prepared: PrepareSettings,
    place: object,
    *,
    fps: float,
    short_side: int | None,
    audio: bool,
    max_seconds: float | None,
) -> int:
    """Of how many stored frames one is read.

    Raises
    ------
    OmniMemError
        What is asked for cannot be cut from what is stored at `place`.
    """
    step = rational(prepared.fps) / rational(fps)
    asked = {}
    if step.denominator != 1:
        asked["fps"] = f"{fps:g}"
    if short_side != prepared.short_side:
        asked["short_side"] = short_side or "none"
    if audio and not prepared.audio:
        asked["audio"] = "on"
    if prepared.max_seconds is not None and (max_seconds is None or max_seconds > prepared.max_seconds):
        asked["max_seconds"] = "none" if max_seconds is None else f"{max_seconds:g}"
    if asked:
        stored = {**asdict(prepared), "audio": "on" if prepared.audio else "off"}
        has = ", ".join(f"{key}={'none' if stored[key] is None else stored[key]}" for key in asked)
        options = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in asked.items() if key != "max_seconds")
        wants = ", ".join(f"{key}={value}" for key, value in asked.items())
        raise OmniMemError(
            f"{place}: prepared with {has}, but {wants} is asked for; ask for what is there (a rate may also divide "
            f"it) or prepare it again: {' '.join(f'omnimem data prepare MANIFEST --to DIR {options}'.split())}"
        )
    return int(step)


def is_whole(shard: Path, nbytes: int) -> bool:
    """Whether a shard is there in its size: the copy of a folder may have been interrupted."""
    try:
        return shard.stat().st_size == nbytes
    except OSError:
        return False


def read_footer(path: Path) -> tuple[PrepareSettings, ClipFacts]:
    """How a shard was made, and the facts about its clip."""
    from pyarrow.parquet import read_metadata

    known = json.loads((read_metadata(path).metadata or {})[FOOTER])
    return PrepareSettings(**known["settings"]), ClipFacts.of(known["clip"])


def rational(value: float) -> Fraction:
    """The fraction meant by a decimal, as `MediaReader` takes it."""
    return Fraction(value).limit_denominator(100_000)

"""The format of a shard: its columns, the settings it was decoded with, and the metadata of its clip.

Columns are typed by `datasets`, so other programs can read shards as well:
``load_dataset("parquet", data_files="prepared/clips/*.parquet", streaming=True)``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from omnimem.errors import OmniMemError
from omnimem.media import MediaInfo

VERSION = 2
FRAMES, AUDIO = "frames", "audio"  # columns of a shard
FOOTER = b"omnimem"  # key of the Parquet metadata that holds the settings and the clip's metadata
INT16_SCALE = 32768  # FFmpeg's scale, so that 16-bit audio of 16 kHz is read back exactly


@dataclass(frozen=True)
class PrepareSettings:
    """How clips are decoded and stored.

    Attributes
    ----------
    fps : float
        Frames per second.
    short_side : int or None
        Frames are scaled down to this shorter side; None keeps their size.
    max_seconds : float or None
        Decode only this much of a clip.
    audio : bool
        Whether audio is stored.
    frame_format : {"webp", "png", "jpeg"}
        ``webp`` (lossless) and ``png`` are exact, ``webp`` is smaller; ``jpeg`` is lossy.
    jpeg_quality : int
        1 to 95; for ``jpeg`` only.
    audio_dtype : {"float32", "int16"}
        ``float32`` is exact.
    """

    fps: float = 1.0
    short_side: int | None = 360
    max_seconds: float | None = None
    audio: bool = True
    frame_format: Literal["webp", "png", "jpeg"] = "webp"
    jpeg_quality: int = 90
    audio_dtype: Literal["float32", "int16"] = "float32"

    @property
    def exact(self) -> bool:
        """Whether the stored frames and samples equal the decoded ones."""
        return self.frame_format != "jpeg" and self.audio_dtype == "float32"

    def recorded(self) -> dict[str, Any]:
        """The settings a shard depends on, in a canonical form (`fps` 1 and 1.0 are the same)."""
        known = {**asdict(self), "fps": float(self.fps)}
        known["max_seconds"] = None if self.max_seconds is None else float(self.max_seconds)
        if self.frame_format != "jpeg":
            del known["jpeg_quality"]
        return known


@dataclass(frozen=True)
class ClipMetadata:
    """Facts about a stored clip that can be read without decoding it.

    Attributes
    ----------
    info : MediaInfo
        Of the original file.
    num_frames : int
        Frames stored.
    frame_size : tuple of int or None
        Height and width of the frames; None without video.
    num_samples : int or None
        Audio samples stored; None when no audio was read.
    end : float
        Second at which the clip ends, or at which `max_seconds` ended it.
    """

    info: MediaInfo
    num_frames: int
    frame_size: tuple[int, int] | None
    num_samples: int | None
    end: float

    @classmethod
    def from_dict(cls, known: dict[str, Any]) -> ClipMetadata:
        """Read the JSON form of `asdict`."""
        frame_size = None if known["frame_size"] is None else tuple(known["frame_size"])
        return cls(**{**known, "info": MediaInfo.from_dict(known["info"]), "frame_size": frame_size})


def read_footer(path: Path) -> tuple[PrepareSettings, ClipMetadata]:
    """Settings of a shard and the metadata of its clip."""
    from pyarrow.parquet import read_metadata

    known = json.loads((read_metadata(path).metadata or {})[FOOTER])
    return PrepareSettings(**known["settings"]), ClipMetadata.from_dict(known["clip"])


def frame_stride(
    prepared: PrepareSettings,
    place: object,
    *,
    fps: float,
    short_side: int | None,
    audio: bool,
    max_seconds: float | None,
) -> int:
    """Return n such that every n-th stored frame gives `fps`; check all requested settings.

    Raises
    ------
    OmniMemError
        The requested settings cannot be served from what is stored at `place`.
    """
    stride = rational(prepared.fps) / rational(fps)
    wanted = {}
    if stride.denominator != 1:
        wanted["fps"] = f"{fps:g}"
    if short_side != prepared.short_side:
        wanted["short_side"] = short_side or "none"
    if audio and not prepared.audio:
        wanted["audio"] = "on"
    if prepared.max_seconds is not None and (max_seconds is None or max_seconds > prepared.max_seconds):
        wanted["max_seconds"] = "none" if max_seconds is None else f"{max_seconds:g}"
    if wanted:
        stored = {**asdict(prepared), "audio": "on" if prepared.audio else "off"}
        has = ", ".join(f"{key}={'none' if stored[key] is None else stored[key]}" for key in wanted)
        options = " ".join(
            f"--{key.replace('_', '-')} {value}" for key, value in wanted.items() if key != "max_seconds"
        )
        wants = ", ".join(f"{key}={value}" for key, value in wanted.items())
        command = f"omnimem data prepare MANIFEST --to DIR {options}".strip()
        raise OmniMemError(
            f"{place}: prepared with {has}, but {wants} is requested; request the stored values (a frame rate may also "
            f"divide the stored one) or prepare again: {command}"
        )
    return int(stride)


def rational(value: float) -> Fraction:
    """The fraction a decimal stands for, as in `MediaReader`."""
    return Fraction(value).limit_denominator(100_000)

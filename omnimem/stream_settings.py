"""How media are read into a model: frame rate, chunk length, resolution, audio, position ids.

settings = StreamSettings.for_backbone(backbone, fps=2.0)
reader, encoder = settings.open("clip.mp4", backbone)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omnimem.backbones import Backbone
from omnimem.backbones.base import StreamEncoder
from omnimem.errors import OmniMemError
from omnimem.media import MediaInfo, MediaReader, open_media, probe


@dataclass(frozen=True)
class StreamSettings:
    """How media are read.

    Attributes
    ----------
    fps : float
        Frames per second.
    chunk_seconds : float
        Length of a chunk: the cache is compressed once per chunk. A multiple of the backbone's `chunk_alignment`.
    short_side : int or None
        Frames are scaled down to this shorter side before the backbone's own resize; None keeps their size.
    max_pixels : int or None
        Upper limit on the pixels of a frame after the backbone's resize; None: the backbone's default.
    audio : bool
        False ignores the audio track.
    max_seconds : float or None
        Read only this much of a clip.
    time_scale : float or "auto"
        Factor on the temporal position ids per second; ``auto`` lowers it when a stream would exceed the range the
        model was trained on.
    position_layout : {"train", "release"}
        Position ids as in training, or as in the published inference code of video-SALMONN 2+ 3B/7B/72B.
    timestamps : int or None
        Largest number of timestamps written between frames, for models that use them (their tokens are never
        evicted); None: one for each temporal patch.
    on_truncated : {"error", "warn"}
        What to do about a file that ends before its header says.
    """

    fps: float = 1.0
    chunk_seconds: float = 10.0
    short_side: int | None = 360
    max_pixels: int | None = None
    audio: bool = True
    max_seconds: float | None = None
    time_scale: float | str = "auto"
    position_layout: str = "train"
    timestamps: int | None = 256
    on_truncated: str = "error"

    @classmethod
    def for_backbone(cls, backbone: Backbone, **given: Any) -> StreamSettings:
        """Settings whose default `chunk_seconds` is the shortest valid length of at least ten seconds."""
        settings = cls(**given)
        if "chunk_seconds" in given:
            return settings
        alignment = backbone.chunk_alignment(settings.fps, settings.audio)
        return replace(settings, chunk_seconds=alignment * math.ceil(settings.chunk_seconds / alignment - 1e-9))

    def check(self, backbone: Backbone) -> None:
        """Refuse a chunk length at which chunk-wise encoding would differ from encoding the whole clip.

        Raises
        ------
        OmniMemError
            `chunk_seconds` is not a multiple of the backbone's `chunk_alignment`.
        """
        alignment = backbone.chunk_alignment(self.fps, self.audio)
        parts = self.chunk_seconds / alignment
        if parts < 1 or abs(parts - round(parts)) > 1e-9:
            raise OmniMemError(
                f"chunk_seconds={self.chunk_seconds:g} does not fit {backbone.name} at {self.fps:g} frames per second: "
                f"use a multiple of {alignment:g}"
            )

    def recorded(self) -> dict[str, Any]:
        """The settings a budget profile records: those that shape the tokens, not the limits on one file."""
        return {k: v for k, v in asdict(self).items() if k not in ("max_seconds", "on_truncated")}

    def open(
        self, path: str | Path, backbone: Backbone, audio_path: str | Path | None = None
    ) -> tuple[MediaReader, StreamEncoder]:
        """Open a file and make the encoder of its stream.

        Parameters
        ----------
        path : path
            The clip.
        backbone : Backbone
        audio_path : path, optional
            Audio file used instead of the clip's own audio track.

        Raises
        ------
        OmniMemError
            The chunk length does not fit the backbone, or the file cannot be read.
        """
        self.check(backbone)
        if not backbone.supports_audio and not probe(path).has_video:
            raise OmniMemError(f"{path}: no video, and {backbone.name} does not support audio; choose another clip")
        reader = open_media(
            path,
            audio_path=audio_path,
            fps=self.fps,
            chunk_seconds=self.chunk_seconds,
            audio=self.audio and backbone.supports_audio,
            short_side=self.short_side,
            max_seconds=self.max_seconds,
            on_truncated="warn" if self.on_truncated == "warn" else "error",
        )
        return reader, self.stream_encoder(reader.info, backbone)

    def stream_encoder(self, info: MediaInfo, backbone: Backbone) -> StreamEncoder:
        """The encoder for a new stream of a clip with these properties."""
        duration = info.duration
        if self.max_seconds is not None:
            duration = self.max_seconds if duration is None else min(duration, self.max_seconds)
        return backbone.stream_encoder(
            video=info.has_video,
            audio=info.has_audio and self.audio and backbone.supports_audio,
            fps=self.fps,
            duration=duration,
            time_scale=self.time_scale,
            max_pixels=self.max_pixels,
            position_layout=self.position_layout,
            timestamps=self.timestamps,
        )

"""Choose the video and audio stream of a file, and read from its header how long they are.

Files hold several languages, qualities and cover images; the choice follows fixed rules, and a choice among several
audio tracks is logged.

    python -c "from omnimem.media import probe; [print(t) for t in probe('clip.mkv').audio_tracks]"
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from .errors import MediaError

log = logging.getLogger("omnimem.media")

STILLS = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
# Containers whose header states the duration; FFmpeg estimates it for others from bit rate or file size.
DURATION_IS_STATED = ("mov", "matroska", "avi", "flac")


@dataclass(frozen=True)
class AudioTrack:
    """One audio track; ``index`` is what ``audio_track=`` takes."""

    index: int
    codec: str
    sample_rate: int
    channels: int
    language: str | None
    default: bool


def choose_video(container: InputContainer) -> VideoStream | None:
    """Choose the video stream (no still images): flagged as default, then the largest, then the first in the file."""
    streams = [s for s in container.streams.video if s.codec_context and not s.disposition & STILLS]
    return max(
        streams,
        key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height, -s.index),
        default=None,
    )


def choose_audio(container: InputContainer, path: Path, track: int | None = None) -> AudioStream | None:
    """Choose the audio stream: ``track``; else flagged as default, highest rate, most channels, first in the file."""
    streams = [s for s in container.streams.audio if s.codec_context]
    if track is not None:
        for stream in streams:
            if stream.index == track:
                return stream
        indices = ", ".join(str(s.index) for s in streams) or "none"
        raise MediaError.about(path, f"no audio track {track} (it has: {indices})", "choose audio_track among them")
    chosen = max(
        streams,
        key=lambda s: (bool(s.disposition & Disposition.default), s.rate, s.channels, -s.index),
        default=None,
    )
    if chosen is not None and len(streams) > 1:
        log.info(
            "%s: audio track %d of %s chosen (%d Hz, %d channels); open_media(audio_track=INDEX) takes another",
            path.name, chosen.index, [s.index for s in streams], chosen.rate, chosen.channels,
        )  # fmt: skip
    return chosen


def describe(stream: AudioStream) -> AudioTrack:
    """Description of an audio stream."""
    return AudioTrack(
        stream.index,
        stream.codec_context.name if stream.codec_context else "unknown",
        stream.rate,
        stream.channels,
        stream.language,
        bool(stream.disposition & Disposition.default),
    )


def header_end(container: InputContainer, chosen: list[VideoStream | AudioStream]) -> Fraction | None:
    """End of the chosen streams according to the header (seconds, file clock); None if it is only an estimate."""
    if not container.format.name.startswith(DURATION_IS_STATED):
        return None
    ends = [_stated_end(stream) for stream in chosen]
    if all(ends):
        return max(end for end in ends if end is not None)
    moving = [s for s in container.streams if not s.disposition & Disposition.attached_pic]
    # The duration of a container is that of its longest stream, which may be one that is not read.
    if container.duration is not None and len(moving) == len(chosen):
        return Fraction(container.duration + (container.start_time or 0), av.time_base)
    return None


def _stated_end(stream: Stream) -> Fraction | None:
    """End of a stream according to its header (seconds, file clock)."""
    if stream.duration and stream.time_base is not None:
        return ((stream.start_time or 0) + stream.duration) * stream.time_base
    tag = stream.metadata.get("DURATION")  # Matroska statistics: HH:MM:SS.nnnnnnnnn
    if tag is None or tag.count(":") != 2:
        return None
    hours, minutes, seconds = tag.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)

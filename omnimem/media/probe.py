"""What is in a media file: streams, sizes, starts, and which streams are used.

Why: files hold several tracks, cover art, rotations and start offsets, and headers are not always right. The
first picture and the first sound are decoded, so sizes and starts are those a player presents.

    python -c "from omnimem.media import probe; print(probe('clip.mp4'))"
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from .container import open_container, reason
from .errors import MediaError
from .frame_layout import FrameLayout
from .tracks import AudioTrack, choose_audio, choose_video, describe, promised_end

COPY = "the file is damaged: copy it again"


@dataclass(frozen=True)
class MediaInfo:
    """Facts about one file, as presented by a player.

    Attributes
    ----------
    path, container : str
        The file and FFmpeg's name of its container format.
    duration : float or None
        Seconds, from the header; ``None`` when the header has none. The stream itself decides where it ends.
    has_video, has_audio : bool
        Whether the file holds pictures, sound; cover art is not video.
    width, height : int
        Displayed size in pixels, after rotation, before ``short_side``; 0 when no video is read.
    rotation : int
        Degrees counter-clockwise by which the stored picture is turned for display (already applied to
        frames).
    average_fps : float or None
        Frames per second by the header.
    video_codec, audio_codec : str or None
        Of the streams used.
    video_index, audio_index : int or None
        The streams used; ``None`` when there is none or it was not asked for.
    audio_tracks : tuple of AudioTrack
        All of them.
    start : float
        The clip's time zero on the file's own clock, in seconds: the earlier of the chosen streams' first
        presented picture and sound.
    video_offset, audio_offset : float or None
        Seconds from time zero to the first picture, and to the first sound.
    """

    path: str
    container: str
    duration: float | None
    has_video: bool
    has_audio: bool
    width: int
    height: int
    rotation: int
    average_fps: float | None
    video_codec: str | None
    audio_codec: str | None
    video_index: int | None
    audio_index: int | None
    audio_tracks: tuple[AudioTrack, ...]
    start: float
    video_offset: float | None
    audio_offset: float | None

    @classmethod
    def of(cls, known: dict[str, Any]) -> MediaInfo:
        """Read what `asdict` and JSON made of it.

        Raises
        ------
        TypeError
            It was written by another version.
        """
        return cls(**{**known, "audio_tracks": tuple(AudioTrack(**track) for track in known["audio_tracks"])})


@dataclass(frozen=True)
class Source:
    """A file with its chosen streams and exact starts: what the two samplers work from.

    ``zero`` and ``promised_end`` are seconds on the file's clock; ``promised_end`` is where the header says
    the chosen streams end, ``None`` where it only estimates. ``first_pts`` is that of the first presented
    picture, in ticks of the video stream; ``layout`` is how pictures are scaled and turned. Both are ``None``
    without pictures.
    """

    path: Path
    info: MediaInfo
    zero: Fraction
    promised_end: Fraction | None
    first_pts: int | None
    layout: FrameLayout | None


def probe(path: str | os.PathLike[str]) -> MediaInfo:
    """Read what is in a file; decodes one picture and a moment of sound.

    Raises
    ------
    MediaError
        The file cannot be read, or holds neither pictures nor sound.
    """
    return inspect(Path(path)).info


def inspect(
    path: Path,
    *,
    video: bool = True,
    audio: bool = True,
    audio_track: int | None = None,
    short_side: int | None = None,
) -> Source:
    """Choose the streams and find their first presented picture and sound."""
    with open_container(path) as container:
        picture_stream = choose_video(container) if video else None
        sound_stream = choose_audio(container, path, audio_track) if audio else None
        if picture_stream is None and sound_stream is None:
            wanted = " or ".join(name for name, asked in (("video", video), ("audio", audio)) if asked)
            raise MediaError.about(path, f"no {wanted} stream in it", "give a file with pictures or sound")
        picture, sound = _first_frames(container, path, picture_stream, sound_stream)
        starts = [frame.pts * frame.time_base for frame in (picture, sound)
                  if frame is not None and frame.pts is not None and frame.time_base is not None]  # fmt: skip
        zero = min(starts, default=Fraction(0))
        rotation = 0 if picture is None else picture.rotation
        width, height = (0, 0) if picture is None else (picture.width, picture.height)
        turned = abs(rotation) % 180 in range(46, 135)
        rate = None if picture_stream is None else picture_stream.average_rate
        info = MediaInfo(
            path=str(path),
            container=container.format.name,
            duration=None if container.duration is None else container.duration / av.time_base,
            has_video=choose_video(container) is not None,
            has_audio=any(stream.codec_context for stream in container.streams.audio),
            width=height if turned else width,
            height=width if turned else height,
            rotation=rotation,
            average_fps=None if rate is None else float(rate),
            video_codec=None if picture_stream is None else picture_stream.codec_context.name,
            audio_codec=None if sound_stream is None else sound_stream.codec_context.name,
            video_index=None if picture_stream is None else picture_stream.index,
            audio_index=None if sound_stream is None else sound_stream.index,
            audio_tracks=tuple(describe(stream) for stream in container.streams.audio),
            start=float(zero),
            video_offset=_offset(picture, zero),
            audio_offset=_offset(sound, zero),
        )
        chosen = [stream for stream in (picture_stream, sound_stream) if stream is not None]
        layout = None if picture is None else FrameLayout.of(picture, short_side)
        first_pts = None if picture is None else picture.pts
        return Source(path, info, zero, promised_end(container, chosen), first_pts, layout)


def _first_frames(
    container: InputContainer, path: Path, video: VideoStream | None, audio: AudioStream | None
) -> tuple[VideoFrame | None, AudioFrame | None]:
    """Decode up to the first picture and the first sound; a stream without a single frame gives ``None``."""
    picture: VideoFrame | None = None
    sound: AudioFrame | None = None
    started = False  # packets before the first key frame cannot be decoded
    try:
        for packet in container.demux([s for s in (video, audio) if s is not None]):
            if video is not None and packet.stream_index == video.index and picture is None:
                started = started or packet.is_keyframe
                if started:
                    picture = next(iter(video.codec_context.decode(packet)), None)
            elif audio is not None and packet.stream_index == audio.index and sound is None:
                sound = _decode_sound(audio, packet)
            if (video is None or picture is not None) and (audio is None or sound is not None):
                break
    except FFmpegError as error:
        what = "sound" if video is None else "picture"
        raise MediaError.about(path, f"the first {what} cannot be decoded ({reason(error)})", COPY) from error
    if picture is None and sound is None:
        raise MediaError.about(path, "it holds no decodable picture or sound", COPY)
    return picture, sound


def _decode_sound(stream: AudioStream, packet: Packet) -> AudioFrame | None:
    try:
        return next(iter(stream.codec_context.decode(packet)), None)
    except FFmpegError:
        return None  # junk before the sound, usual in MP3; the sampler reports damaged packets


def _offset(frame: VideoFrame | AudioFrame | None, zero: Fraction) -> float | None:
    if frame is None or frame.pts is None or frame.time_base is None:
        return None
    return float(frame.pts * frame.time_base - zero)

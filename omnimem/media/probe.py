"""Inspect a media file: its streams, sizes and start times, and which streams are used.

Files hold several tracks, cover art, rotations and start offsets, and headers are not always right. The first frame of
video and of audio is decoded, so sizes and start times are those that a player presents.

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
from .tracks import AudioTrack, choose_audio, choose_video, describe, header_end

COPY = "the file is damaged: copy it again"


@dataclass(frozen=True)
class MediaInfo:
    """Properties of one file, as presented by a player.

    Attributes
    ----------
    path, container : str
        File, and FFmpeg's name of its container format.
    duration : float or None
        Seconds according to FFmpeg, which estimates them for some containers; None if unknown. Decoding may end
        elsewhere.
    has_video, has_audio : bool
        Whether the file has video, audio; cover art is not video.
    width, height : int
        Size in pixels for display, after rotation, before ``short_side``; 0 if no video is read.
    rotation : int
        Degrees counter-clockwise by which stored frames are rotated for display (applied to `Chunk.frames`).
    average_fps : float or None
        Frames per second according to the header.
    video_codec, audio_codec : str or None
        Codecs of the streams used.
    video_index, audio_index : int or None
        Indices of the streams used; None if there is none or it is not read.
    audio_tracks : tuple of AudioTrack
        All audio tracks.
    start : float
        The clip's time zero on the clock of the file, in seconds: the start of the first frame of video or audio,
        whichever is earlier.
    video_offset, audio_offset : float or None
        Seconds from time zero to the first frame of video, of audio.
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
    def from_dict(cls, known: dict[str, Any]) -> MediaInfo:
        """Rebuild from the output of `asdict` after JSON.

        Raises
        ------
        KeyError, TypeError
            The keys differ, because another version wrote them.
        """
        return cls(**{**known, "audio_tracks": tuple(AudioTrack(**track) for track in known["audio_tracks"])})


@dataclass(frozen=True)
class Source:
    """A file with its chosen streams and exact start times: the input of `VideoSampler` and `AudioTimeline`.

    ``zero`` and ``header_end`` are seconds on the clock of the file; ``header_end`` is the end of the streams
    according to the header, None if that is an estimate. ``first_pts`` is the presentation time of the first frame in
    ticks of the video stream, ``layout`` the scaling and rotation of frames; both are None without video.
    """

    path: Path
    info: MediaInfo
    zero: Fraction
    header_end: Fraction | None
    first_pts: int | None
    layout: FrameLayout | None


def probe(path: str | os.PathLike[str]) -> MediaInfo:
    """Properties of a file; decodes one frame of video and of audio.

    Raises
    ------
    MediaError
        The file cannot be read, or has neither video nor audio.
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
    """Choose the streams and decode their first frames; see `MediaReader` for the parameters."""
    with open_container(path) as container:
        video_stream = choose_video(container) if video else None
        audio_stream = choose_audio(container, path, audio_track) if audio else None
        if video_stream is None and audio_stream is None:
            wanted = " or ".join(name for name, asked in (("video", video), ("audio", audio)) if asked)
            raise MediaError.about(path, f"no {wanted} stream in it", "give a file with video or audio")
        video_frame, audio_frame = _first_frames(container, path, video_stream, audio_stream)
        starts = [frame.pts * frame.time_base for frame in (video_frame, audio_frame)
                  if frame is not None and frame.pts is not None and frame.time_base is not None]  # fmt: skip
        zero = min(starts, default=Fraction(0))
        rotation = 0 if video_frame is None else video_frame.rotation
        width, height = (0, 0) if video_frame is None else (video_frame.width, video_frame.height)
        turned = abs(rotation) % 180 in range(46, 135)
        rate = None if video_stream is None else video_stream.average_rate
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
            video_codec=None if video_stream is None else video_stream.codec_context.name,
            audio_codec=None if audio_stream is None else audio_stream.codec_context.name,
            video_index=None if video_stream is None else video_stream.index,
            audio_index=None if audio_stream is None else audio_stream.index,
            audio_tracks=tuple(describe(stream) for stream in container.streams.audio),
            start=float(zero),
            video_offset=_offset(video_frame, zero),
            audio_offset=_offset(audio_frame, zero),
        )
        chosen = [stream for stream in (video_stream, audio_stream) if stream is not None]
        layout = None if video_frame is None else FrameLayout.of(video_frame, short_side)
        first_pts = None if video_frame is None else video_frame.pts
        return Source(path, info, zero, header_end(container, chosen), first_pts, layout)


def _first_frames(
    container: InputContainer, path: Path, video: VideoStream | None, audio: AudioStream | None
) -> tuple[VideoFrame | None, AudioFrame | None]:
    """Decode the first frame of video and of audio; None for a stream without frames."""
    video_frame: VideoFrame | None = None
    audio_frame: AudioFrame | None = None
    started = False  # packets before the first key frame cannot be decoded
    try:
        for packet in container.demux([s for s in (video, audio) if s is not None]):
            if video is not None and packet.stream_index == video.index and video_frame is None:
                started = started or packet.is_keyframe
                if started:
                    video_frame = next(iter(video.codec_context.decode(packet)), None)
            elif audio is not None and packet.stream_index == audio.index and audio_frame is None:
                audio_frame = _first_audio_frame(audio, packet)
            if (video is None or video_frame is not None) and (audio is None or audio_frame is not None):
                break
    except FFmpegError as error:
        what = "audio" if video is None else "video"
        raise MediaError.about(path, f"the first {what} frame cannot be decoded ({reason(error)})", COPY) from error
    if video_frame is None and audio_frame is None:
        raise MediaError.about(path, "it has no decodable video or audio", COPY)
    return video_frame, audio_frame


def _first_audio_frame(stream: AudioStream, packet: Packet) -> AudioFrame | None:
    try:
        return next(iter(stream.codec_context.decode(packet)), None)
    except FFmpegError:
        return None  # data before the audio, common in MP3; `AudioTimeline` reports damaged packets


def _offset(frame: VideoFrame | AudioFrame | None, zero: Fraction) -> float | None:
    """Seconds from time zero to a frame."""
    if frame is None or frame.pts is None or frame.time_base is None:
        return None
    return float(frame.pts * frame.time_base - zero)

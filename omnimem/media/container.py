"""Open media files with FFmpeg, restricted to an allow-list of containers; all reading goes through here.

FFmpeg also opens formats that refer to other files or addresses (playlists, file name patterns, session descriptions),
and it detects a format by content, not by suffix. Without the list, a file of a data set could make FFmpeg read any
file of the machine. Only containers that hold their own audio and video are allowed.

    python -c "from omnimem.media import probe; probe('README.md')"  # MediaError: this is text
"""

from __future__ import annotations

import errno
import os
import re
import threading
from pathlib import Path
from typing import cast

import av
import av.logging
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Discard, Stream

from .errors import MediaError

CONTAINERS = (
    # Containers for video; most can also hold audio only.
    "mov,matroska,avi,flv,live_flv,asf,mpegts,mpeg,mpegvideo,mxf,gxf,dv,nut,ogg,rm,wtv,ivf,dhav,gif,"
    # Video without a container.
    "h261,h263,h264,hevc,vvc,av1,obu,m4v,mjpeg,vc1,yuv4mpegpipe,"
    # Audio.
    "aac,ac3,ac4,aiff,amr,ape,au,caf,dsf,dts,dtshd,eac3,flac,iff,loas,mlp,mp3,mpc,mpc8,nistsphere,oma,sox,tak,truehd,"
    "tta,voc,w64,wav,wv"
)
"""Allowed demuxers, by FFmpeg's names. With `OPTIONS` none of them opens another file."""

OPTIONS = {
    "format_whitelist": CONTAINERS,
    "protocol_whitelist": "file",
    "enable_drefs": "0",  # MOV: do not follow references to tracks in other files (the default, stated)
    "use_absolute_path": "0",
}

REFERENCING_FORMATS = (
    "hls",
    "concat",
    "dash",
    "imf",
    "sdp",
    "rtsp",
    "rtp",
    "sap",
    "image2",
    "webm_dash_manifest",
    "vobsub",
)
"""Playlists, file name patterns and session descriptions, by FFmpeg's names."""

_logging = threading.Lock()


def open_container(path: Path, metadata_errors: str = "ignore") -> InputContainer:
    """Open ``path`` for reading (use as a context manager).

    Parameters
    ----------
    path : Path
        A local file.
    metadata_errors : str
        Decoding of metadata that is not UTF-8: ``ignore``, or ``strict`` to raise.

    Raises
    ------
    MediaError
        The path does not exist, is a directory or not readable, or the file is empty, has no index, is not a media
        file, or has a format that is not in `CONTAINERS`.
    UnicodeDecodeError
        With ``strict``, for metadata that is not UTF-8.
    """
    try:
        return _open(path, metadata_errors)
    except FileNotFoundError:
        raise MediaError.about(path, "no such file", "check the path") from None
    except IsADirectoryError:
        raise MediaError.about(path, "this is a directory", "name one media file in it") from None
    except PermissionError:
        raise MediaError.about(path, "permission denied", "check the file's permissions") from None
    except FFmpegError as error:
        raise MediaError.about(path, *_why_unreadable(path, error)) from error


def _open(path: Path, metadata_errors: str = "ignore") -> InputContainer:
    # "file:" keeps names with colons from being read as a protocol.
    return cast(InputContainer, av.open(f"file:{path}", options=dict(OPTIONS), metadata_errors=metadata_errors))


def _why_unreadable(path: Path, error: FFmpegError) -> tuple[str, str]:
    """Cause and advice for a file that no allowed demuxer accepts."""
    if os.path.getsize(path) == 0:
        return "the file is empty", "copy or download it again"
    refused = _refused_format(path) if error.errno == errno.EINVAL else None
    if refused is not None:
        return _why_refused(refused)
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp":
        return "an MP4/MOV file without its index (moov): it was cut off", "copy or record it again"
    return f"not a media file FFmpeg can read ({reason(error)})", "give an audio or video file"


def _refused_format(path: Path) -> str | None:
    """FFmpeg's name of a format that is not allowed, from FFmpeg's log; None if the file failed otherwise."""
    with _logging:  # FFmpeg's log settings are global to the process
        level, skip_repeated = av.logging.get_level(), av.logging.get_skip_repeated()
        av.logging.set_level(av.logging.ERROR)
        av.logging.set_skip_repeated(False)  # else PyAV would attribute the message to a later format
        try:
            with av.logging.Capture() as lines:
                _open(path).close()
        except FFmpegError:
            return next((name for _, name, text in lines if "not on whitelist" in text), None)
        finally:
            av.logging.set_level(level)
            av.logging.set_skip_repeated(skip_repeated)
    return None


def _why_refused(name: str) -> tuple[str, str]:
    """Cause and advice for a format that is not in `CONTAINERS`."""
    if name in REFERENCING_FORMATS:
        what = f"it refers to other files ({name}), which is not allowed; only its own audio and video are read"
        return what, "give the media file itself, or make one: ffmpeg -i LIST -c copy clip.mkv"
    if name == "tty":
        return "this is text, not a media file", "give an audio or video file"
    if re.search("_pipe$|^(ico|apng|jpegxl_anim)$", name):
        return f"a still picture ({name}), not audio or video", "give an audio or video file"
    return f"unsupported format ({name})", "give an audio or video file, or convert it with ffmpeg"


def reason(error: FFmpegError) -> str:
    """FFmpeg's message of an error, in lower case, without the error number."""
    return (error.strerror or str(error)).lower()


def discard_other_streams(container: InputContainer, stream: Stream) -> None:
    """Make the demuxer skip the data of all other streams."""
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all


def is_truncated(container: InputContainer, stream: Stream) -> bool:
    """Whether the index of an MP4/MOV file names data that lies beyond the end of the file."""
    if not container.format.name.startswith("mov") or len(stream.index_entries) == 0:
        return False
    final = stream.index_entries[len(stream.index_entries) - 1]
    return final.pos + final.size > container.size

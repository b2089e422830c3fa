"""Opening a file with FFmpeg's demuxers, and saying in one line why one cannot be opened.

Why: PyAV reports an empty file, a text file and a recording without its index with the same words; a user
needs to know which it is.

    python -c "from omnimem.media import probe; probe('README.md')"
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Discard, Stream

from .errors import MediaError


def open_container(path: Path) -> InputContainer:
    """Open ``path`` for reading (use as a context manager).

    Raises
    ------
    MediaError
        No such file, a directory, not permitted, empty, without index, or not a media file.
    """
    try:
        # "file:" keeps names with colons from being read as a protocol; metadata need not be UTF-8.
        container = cast(InputContainer, av.open(f"file:{path}", metadata_errors="ignore"))
    except FileNotFoundError:
        raise MediaError.about(path, "no such file", "check the path") from None
    except IsADirectoryError:
        raise MediaError.about(path, "this is a directory", "name one media file in it") from None
    except PermissionError:
        raise MediaError.about(path, "not permitted to read it", "check the file's permissions") from None
    except FFmpegError as error:
        raise MediaError.about(path, *_why_unreadable(path, error)) from error
    if container.format.name == "tty":
        container.close()
        raise MediaError.about(path, "this is text, which FFmpeg would draw", "give an audio or video file")
    return container


def _why_unreadable(path: Path, error: FFmpegError) -> tuple[str, str]:
    """Cause and advice for a file that no demuxer accepts."""
    if os.path.getsize(path) == 0:
        return "the file is empty", "copy or download it again"
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp":
        return "an MP4/MOV file without its index (moov): it was cut off", "copy or record it again"
    return f"not a media file FFmpeg can read ({reason(error)})", "give an audio or video file"


def reason(error: FFmpegError) -> str:
    """FFmpeg's own words for an error, in lower case and without the error number."""
    return (error.strerror or str(error)).lower()


def read_only(container: InputContainer, stream: Stream) -> None:
    """Let the demuxer skip every other stream's data."""
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all


def is_cut_short(container: InputContainer, stream: Stream) -> bool:
    """Whether the index of an MP4/MOV file names data that lies beyond the end of the file."""
    if not container.format.name.startswith("mov") or len(stream.index_entries) == 0:
        return False
    final = stream.index_entries[len(stream.index_entries) - 1]
    return final.pos + final.size > container.size

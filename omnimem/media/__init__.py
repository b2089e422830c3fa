"""Decode media files to frames at a fixed rate and 16 kHz mono audio: lazily, in time order, with bounded memory.

Streaming needs a few seconds of a clip at a time. Depends on NumPy and PyAV only.

    python -c "from omnimem.media import open_media; [print(c) for c in open_media('clip.mp4', fps=2)]"
"""

from .chunk import Chunk
from .errors import MediaError
from .probe import AudioTrack, MediaInfo, probe
from .reader import MediaReader, open_media

__all__ = ["AudioTrack", "Chunk", "MediaError", "MediaInfo", "MediaReader", "open_media", "probe"]

"""`MediaError`, the exception for unreadable media files: one line with file, cause and what to do.

Command line, data preparation and training print the message unchanged.

    python -c "from omnimem.media import open_media; open_media('missing.mp4')"
"""

from __future__ import annotations

from pathlib import Path

from omnimem.errors import OmniMemError


class MediaError(OmniMemError, ValueError):
    """A media file cannot be read as asked. The message is one line: ``clip.mp4: cause; what to do``."""

    @classmethod
    def about(cls, path: Path, cause: str, advice: str) -> MediaError:
        """Build the message ``name: cause; advice`` on a single line."""
        return cls(" ".join(f"{path.name}: {cause}; {advice}".split()))

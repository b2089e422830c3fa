"""Convert decoded frames to RGB arrays: scaled down, rotated for display, one size per stream.

Phones store rotated frames with a display matrix, which players apply. Only sampled frames are converted.

    python -c "from omnimem.media import probe; print(probe('phone.mp4').rotation)"
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from av.video.frame import VideoFrame


@dataclass(frozen=True)
class FrameLayout:
    """Size of a stored frame after scaling (pixels), and the transposition and flips that rotate it for display."""

    width: int
    height: int
    transpose: bool
    flip_rows: bool
    flip_columns: bool

    @classmethod
    def of(cls, frame: VideoFrame, short_side: int | None) -> FrameLayout:
        """Layout of a stream from its first frame; ``short_side`` limits the shorter side (never scales up)."""
        width, height = frame.width, frame.height
        if short_side is not None and short_side < min(width, height):
            short = short_side // 2 * 2
            long = 2 * round(max(width, height) * short / min(width, height) / 2)
            width, height = (short, long) if width < height else (long, short)
        return cls(width, height, *_rotation(frame))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape ``(H, W, 3)`` for display."""
        return (self.width, self.height, 3) if self.transpose else (self.height, self.width, 3)

    def rgb(self, frame: VideoFrame) -> np.ndarray:
        """Convert one decoded frame to uint8 ``[H, W, 3]``."""
        fits = (frame.width, frame.height) == (self.width, self.height)
        converted = frame.reformat(
            self.width, self.height, "rgb24", interpolation=None if fits else "BICUBIC", threads=1
        )
        pixels = converted.to_ndarray()
        if self.transpose:
            pixels = pixels.transpose(1, 0, 2)
        return np.ascontiguousarray(pixels[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1])


def _rotation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """Read the display matrix as (transpose, flip rows, flip columns), to the nearest quarter turn.

    FFmpeg's ``libavutil/display.h``: a stored pixel (x, y) is shown at (a x + c y, b x + d y), the matrix
    being a b u / c d v / x y w in 16.16 fixed point, row by row.
    """
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(side_data), dtype="=i4")[:5]
    if abs(int(b)) > abs(int(a)):
        return True, bool(b < 0), bool(c < 0)
    return False, bool(d < 0), bool(a < 0)

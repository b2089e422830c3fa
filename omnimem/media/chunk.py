"""What the media room hands out: one interval of a clip, its sampled pictures and its sound.

Why: everything above works on intervals of fixed length, one at a time; nothing whole-video is ever resident.

    python -c "from omnimem.media import open_media; print(next(iter(open_media('clip.mp4'))))"
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Chunk:
    """Pictures and sound of ``[t0, t1)``, in seconds after the clip's time zero.

    Attributes
    ----------
    index : int
        Position on the grid: ``t0 == index * chunk_seconds``.
    t0, t1 : float
        Seconds. ``t1`` is the next grid point, or the end of the clip in the last chunk.
    frames : np.ndarray
        uint8 ``[T, H, W, 3]``, RGB, turned as a player shows it. ``T`` may be 0.
    frame_times : np.ndarray
        float64 ``[T]``, the sampling instants ``i / fps`` (seconds), all within ``[t0, t1)``.
    audio : np.ndarray or None
        float32 ``[S]``, mono, 16 kHz, nominally within ±1. ``None`` when the clip has no sound or sound was
        not asked for; shorter (down to ``S == 0``) once the sound has ended.
    audio_before, audio_after : np.ndarray
        float32, the neighbouring samples, up to ``context_seconds`` each; empty at the ends of the sound.
    last : bool
        No chunk follows.
    """

    index: int
    t0: float
    t1: float
    frames: np.ndarray
    frame_times: np.ndarray
    audio: np.ndarray | None
    audio_before: np.ndarray
    audio_after: np.ndarray
    last: bool

    def __repr__(self) -> str:
        sound = "none" if self.audio is None else f"{len(self.audio)} samples"
        shape = "x".join(map(str, self.frames.shape))
        span = f"[{self.t0:g}, {self.t1:g}) s"
        return f"Chunk({self.index}, {span}, frames {shape}, audio {sound}, last={self.last})"

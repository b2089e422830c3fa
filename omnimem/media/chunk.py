"""`Chunk`: the sampled frames and the audio of one interval of a clip.

Streaming works on one interval of fixed length at a time; a whole video is never in memory.

    python -c "from omnimem.media import open_media; print(next(iter(open_media('clip.mp4'))))"
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Chunk:
    """Frames and audio of ``[t0, t1)``, in seconds after time zero: the start of the first video or audio frame.

    Attributes
    ----------
    index : int
        Number of the interval: ``t0 == index * chunk_seconds``.
    t0, t1 : float
        Seconds. ``t1`` is ``t0 + chunk_seconds``, or the end of the clip in the last chunk.
    frames : np.ndarray
        uint8 ``[T, H, W, 3]``, RGB, rotated for display. ``T`` may be 0.
    frame_times : np.ndarray
        float64 ``[T]``, the sampling instants ``i / fps`` (seconds), all within ``[t0, t1)``.
    audio : np.ndarray or None
        float32 ``[S]``, mono, 16 kHz, nominally within ±1. None if the clip has no audio or it is not read; shorter
        than the interval (down to ``S == 0``) once the audio has ended.
    audio_before, audio_after : np.ndarray
        float32, neighbouring samples, up to ``context_seconds`` each; empty at the ends of the audio.
    last : bool
        Whether this is the last chunk.
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
        audio = "none" if self.audio is None else f"{len(self.audio)} samples"
        shape = "x".join(map(str, self.frames.shape))
        span = f"[{self.t0:g}, {self.t1:g}) s"
        return f"Chunk({self.index}, {span}, frames {shape}, audio {audio}, last={self.last})"

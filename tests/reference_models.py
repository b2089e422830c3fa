"""Run a whole clip through the transformers model, and the same clip through a backbone's stream."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnimem.backbones import Backbone, ChunkInputs
from omnimem.budget import BudgetProfile
from omnimem.forward import Stream
from omnimem.media import open_media
from omnimem.memory import CompressedCache
from omnimem.selection import build_selection

QUESTION = "What is seen?"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass
class Whole:
    """A clip decoded completely."""

    frames: np.ndarray
    audio: np.ndarray | None
    fps: float

    @property
    def video(self) -> Tensor:
        return torch.from_numpy(self.frames).permute(0, 3, 1, 2)


def whole_clip(path: Path, fps: float, **options: Any) -> Whole:
    chunks = list(open_media(path, fps=fps, chunk_seconds=60 / fps, **options))
    audio = None if chunks[0].audio is None else np.concatenate([chunk.audio for chunk in chunks])
    return Whole(np.concatenate([chunk.frames for chunk in chunks]), audio, fps)


@torch.no_grad()
def streamed(
    backbone: Backbone, path: Path, fps: float, chunk_seconds: float, settings: dict | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[1, T, V]``, ids ``[3, 1, T]`` and modality ``[1, T]`` of a stream whose cache retains everything."""
    profile = BudgetProfile.uniform(backbone.config, mean=4000, ratio=1.0)
    cache = CompressedCache(profile, build_selection("omnimem"))
    stream = Stream(backbone, cache)
    reader = open_media(path, fps=fps, chunk_seconds=chunk_seconds, **options)
    encoder = backbone.stream_encoder(
        video=reader.info.has_video,
        audio=reader.info.has_audio and options.get("audio", True) and backbone.supports_audio,
        fps=fps,
        duration=min(reader.info.duration or 1e9, options.get("max_seconds", 1e9)),
        **(settings or {}),
    )
    hidden = [stream.forward(encoder.prefix(), text=True)]
    for chunk in reader:
        inputs = encoder.encode(chunk)
        if len(inputs):
            hidden.append(stream.forward(inputs))
            cache.compress()
    closing = encoder.closing()
    if len(closing):
        hidden.append(stream.forward(closing, text=True))
    question = ChunkInputs.text(backbone.embed(backbone.question_ids(QUESTION)), closing.next_position_id)
    hidden.append(stream.forward(question, text=True))
    kept = cache.token_metadata(0)
    return backbone.lm_head(torch.cat(hidden, dim=1)), kept.position_ids.permute(2, 0, 1), kept.modality

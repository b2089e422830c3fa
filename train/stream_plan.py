"""Token plan of a stream: how many tokens its media become, computed from headers without decoding."""

from __future__ import annotations

import math
from dataclasses import dataclass

from data_prep.manifest import Row
from omnimem.backbones import Backbone
from omnimem.stream_settings import StreamSettings
from train.data import clip_info


@dataclass(frozen=True)
class StreamPlan:
    """One row of the data.

    Attributes
    ----------
    name : str
        Of the clip.
    seconds : float
        Length that is read; 0 if the header does not say it.
    chunks : int
        Number of chunks.
    visual, audio : int
        Tokens of the stream by modality.
    largest_chunk : int
        Visual and audio tokens of the largest chunk.
    questions : int
        Number of questions.
    answer : int
        Tokens of the longest answer.
    text : int
        Text tokens between frames (timestamps), which are never evicted.
    """

    name: str
    seconds: float
    chunks: int
    visual: int
    audio: int
    largest_chunk: int
    questions: int
    answer: int
    text: int = 0

    @property
    def tokens(self) -> int:
        """Visual and audio tokens of the stream."""
        return self.visual + self.audio


def plan_stream(row: Row, backbone: Backbone, settings: StreamSettings) -> StreamPlan:
    """Plan a row from its clip's header; a clip whose header has no duration counts as 0 s."""
    info = clip_info(row)
    seconds = min(info.duration or 0.0, settings.max_seconds or math.inf)
    frame = None
    if info.has_video:
        scale = min(1.0, (settings.short_side or math.inf) / min(info.height, info.width))
        frame = (round(info.height * scale), round(info.width * scale))
    chunks = backbone.tokens_per_chunk(
        frame_size=frame,
        audio=info.has_audio and row.audio and settings.audio,
        fps=settings.fps,
        seconds=seconds,
        chunk_seconds=settings.chunk_seconds,
        max_pixels=settings.max_pixels,
    )
    return StreamPlan(
        name=row.name,
        seconds=seconds,
        chunks=len(chunks),
        visual=sum(visual for visual, _ in chunks),
        audio=sum(audio for _, audio in chunks),
        largest_chunk=max((visual + audio for visual, audio in chunks), default=0),
        questions=len(row.questions),
        answer=max(len(backbone.answer_ids(question.answer)[0]) for question in row.questions),
        text=backbone.text_tokens(settings.fps, seconds, settings.timestamps) if info.has_video else 0,
    )

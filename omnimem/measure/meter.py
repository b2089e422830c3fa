"""Measure a stream: time per chunk, time to the first token, and peak memory.

    with Meter(session) as meter:
        for event in meter.watch("clip.mp4"):
            answer, first_token_seconds = meter.ask("What is heard?")
    print(meter.kv_peak, meter.step_seconds)

`omnimem compare` and `omnimem bench` both use it. On CUDA, every clock reading synchronises with the device.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import StoppingCriteria

from omnimem.backbones import Backbone, ChunkInputs, StreamEncoder
from omnimem.errors import OmniMemError
from omnimem.media import Chunk, MediaInfo, MediaReader
from omnimem.stream import StreamEvent, StreamingSession
from omnimem.stream_settings import StreamSettings

SAMPLE_RATE = 16_000

REPEATED_SECONDS = 60.0
"""At most this much of a clip is kept in memory to be repeated."""


class Meter:
    """Streams and asks through a session and measures the cost.

    Parameters
    ----------
    session : StreamingSession
        A session that nothing else uses.

    Attributes
    ----------
    kv_peak : int
        Largest size of keys and values after any forward: retained and new tokens before compression, or retained
        tokens, question and answer.
    memory_peak : int
        The same for the whole cache, with buffers and the state of the selection method.
    device_peak : int or None
        CUDA: peak bytes allocated by PyTorch beyond those at the start (weights); None on other devices.
    step_seconds : list of float
        Encoding, forward and selection of every chunk but the first of a stream, which includes one-time work. Time
        spent waiting for the decoding thread is not included.
    """

    def __init__(self, session: StreamingSession) -> None:
        self.session = session
        self.kv_peak = self.memory_peak = 0
        self.device_peak: int | None = None
        self.step_seconds: list[float] = []
        self._step_started = 0.0
        given = {field.name: getattr(session.settings, field.name) for field in fields(StreamSettings)}
        session.settings = _MeteredSettings(**given, on_step=self._start_step)

    def __enter__(self) -> Meter:
        device = self.session.backbone.device
        self._hook = self.session.backbone.language_model.register_forward_hook(self._after_forward)
        if device.type == "cuda":
            gc.collect()
            torch.cuda.reset_peak_memory_stats(device)
            self._device_bytes = torch.cuda.memory_allocated(device)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        device = self.session.backbone.device
        if device.type == "cuda":
            self.device_peak = torch.cuda.max_memory_allocated(device) - self._device_bytes

    def watch(self, media: str | Path, loop_seconds: float | None = None, **settings: Any) -> Iterator[StreamEvent]:
        """`StreamingSession.watch`; `loop_seconds` repeats the clip until the stream has this length."""
        for event in self.session.watch(media, loop_seconds=loop_seconds, **settings):
            if event.chunk > 0:
                self.step_seconds.append(self._now() - self._step_started)
            yield event

    def ask(self, question: str, max_new_tokens: int) -> tuple[str, float]:
        """The greedy answer, and the seconds from the question until the first token is on the host."""
        first = _FirstToken()
        started = self._now()
        answer = self.session.ask(question, max_new_tokens=max_new_tokens, stopping_criteria=[first])
        return cast(str, answer), first.arrived - started

    def _start_step(self) -> None:
        self._step_started = self._now()

    def _after_forward(self, *_: object) -> None:
        memory = self.session.cache
        self.kv_peak = max(self.kv_peak, memory.kv_nbytes)
        self.memory_peak = max(self.memory_peak, memory.nbytes)

    def _now(self) -> float:
        if self.session.backbone.device.type == "cuda":
            torch.cuda.synchronize(self.session.backbone.device)
        return time.perf_counter()


class _FirstToken(StoppingCriteria):
    """Records when the first token is generated; never stops the generation."""

    arrived = math.nan

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if math.isnan(self.arrived):
            # The streamer has just copied the token to the host.
            self.arrived = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class _MeteredSettings(StreamSettings):
    """Settings whose encoder reports the start of every step, and whose reader can repeat the clip."""

    on_step: Callable[[], None] = lambda: None
    loop_seconds: float | None = None

    def open(
        self, path: str | Path, backbone: Backbone, audio_path: str | Path | None = None
    ) -> tuple[MediaReader, StreamEncoder]:
        """As `StreamSettings.open`."""
        if self.loop_seconds is None:
            return super().open(path, backbone, audio_path)
        once = replace(self, loop_seconds=None, max_seconds=min(REPEATED_SECONDS, self.max_seconds or math.inf))
        reader, _ = StreamSettings.open(once, path, backbone, audio_path)
        full_length = replace(self, max_seconds=self.loop_seconds)
        encoder = full_length.stream_encoder(replace(reader.info, duration=self.loop_seconds), backbone)
        chunks = repeat(reader, self.fps, self.chunk_seconds, self.loop_seconds)
        return cast(MediaReader, _Repeated(reader.info, chunks)), encoder

    def stream_encoder(self, info: MediaInfo, backbone: Backbone) -> StreamEncoder:
        """As `StreamSettings.stream_encoder`."""
        encoder = super().stream_encoder(info, backbone)
        encode = encoder.encode

        def timed(chunk: Chunk) -> ChunkInputs:
            self.on_step()
            return encode(chunk)

        encoder.encode = timed  # not the reader, which runs in another thread
        return encoder


@dataclass(frozen=True)
class _Repeated:
    """A repeated clip, with the parts of `MediaReader` that `watch` uses."""

    info: MediaInfo
    chunks: Iterator[Chunk]

    def __iter__(self) -> Iterator[Chunk]:
        return self.chunks


def repeat(reader: MediaReader, fps: float, chunk_seconds: float, seconds: float) -> Iterator[Chunk]:
    """Repeat the full chunks of a clip, decoded once, with increasing times, until `seconds` are reached.

    Raises
    ------
    OmniMemError
        The clip is shorter than one chunk.
    """
    frames = round(fps * chunk_seconds) if reader.info.has_video else 0
    samples = round(SAMPLE_RATE * chunk_seconds)
    full_chunks: list[Chunk] = []
    for chunk in reader:
        if len(chunk.frames) < frames or (chunk.audio is not None and len(chunk.audio) < samples):
            break
        full_chunks.append(chunk)
    if not full_chunks:
        name = Path(reader.info.path).name
        raise OmniMemError(
            f"{name}: shorter than a chunk of {chunk_seconds:g} s; choose a longer clip or shorter chunks"
        )
    count = math.ceil(seconds / chunk_seconds - 1e-6)
    for index in range(count):
        chunk = full_chunks[index % len(full_chunks)]
        start = index * chunk_seconds
        yield replace(
            chunk,
            index=index,
            t0=start,
            t1=start + chunk_seconds,
            frame_times=chunk.frame_times - chunk.t0 + start,
            last=index == count - 1,
        )

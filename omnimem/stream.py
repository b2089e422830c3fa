"""One stream: chunks in, memory bounded, questions answered at any moment.

`StreamingSession` adds files, questions and text to the forward path of `omnimem.forward`::

    session = StreamingSession.from_pretrained("runs/quickstart")
    for event in session.watch("clip.mp4"):
        print(event.seconds, event.retained)
    print(session.ask("What is heard?"))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from omnimem.backbones import Backbone, load_backbone
from omnimem.backbones.adapter import load_adapter, resolve_checkpoint
from omnimem.backbones.base import StreamEncoder
from omnimem.budget import PROFILE_FILE, BudgetProfile
from omnimem.errors import OmniMemError
from omnimem.forward import Stream
from omnimem.media import Chunk, MediaInfo, MediaReader, open_media, probe
from omnimem.media.prefetch import prefetch
from omnimem.memory import CompressedCache
from omnimem.selection import build_selection


@dataclass(frozen=True)
class StreamSettings:
    """How media are read.

    Attributes
    ----------
    fps : float
        Frames a second.
    chunk_seconds : float
        Seconds of media between two compressions; a multiple of the backbone's `chunk_alignment`.
    short_side : int or None
        Frames are scaled down to this shorter side before the backbone's own resize; None keeps them.
    max_pixels : int or None
        Upper limit of the pixels of a frame after the backbone's resize; None: the backbone's own.
    audio : bool
        Whether the sound is heard.
    max_seconds : float or None
        Stop reading here.
    time_scale : float or "auto"
        Factor on the rotary ids a second; ``auto`` lowers it when a stream would leave the trained range.
    position_layout : {"train", "release"}
        Rotary ids as trained, or as the published inference code of video-SALMONN 2+ 3B/7B/72B counts them.
    timestamps : int or None
        Most times written between the pictures, for models that do so (they stay in memory); None: one a patch.
    on_truncated : {"error", "warn"}
        What a file that ends before its header says does.
    """

    fps: float = 1.0
    chunk_seconds: float = 10.0
    short_side: int | None = 360
    max_pixels: int | None = None
    audio: bool = True
    max_seconds: float | None = None
    time_scale: float | str = "auto"
    position_layout: str = "train"
    timestamps: int | None = 256
    on_truncated: str = "error"

    @classmethod
    def fitting(cls, backbone: Backbone, **given: Any) -> StreamSettings:
        """Settings with, unless one is given, the shortest chunks of at least ten seconds that fit the backbone."""
        settings = cls(**given)
        if "chunk_seconds" in given:
            return settings
        alignment = backbone.chunk_alignment(settings.fps, settings.audio)
        return replace(settings, chunk_seconds=alignment * math.ceil(settings.chunk_seconds / alignment - 1e-9))

    def check(self, backbone: Backbone) -> None:
        """Refuse a chunk length at whose edges the backbone's encoders would not be exact.

        Raises
        ------
        OmniMemError
            `chunk_seconds` is no multiple of the backbone's `chunk_alignment`.
        """
        alignment = backbone.chunk_alignment(self.fps, self.audio)
        parts = self.chunk_seconds / alignment
        if parts < 1 or abs(parts - round(parts)) > 1e-9:
            raise OmniMemError(
                f"chunk_seconds={self.chunk_seconds:g} does not fit {backbone.name} at {self.fps:g} frames a second: "
                f"use a multiple of {alignment:g}"
            )

    def recorded(self) -> dict[str, Any]:
        """What a profile records: what shapes the positions, not how one file was cut short."""
        return {k: v for k, v in asdict(self).items() if k not in ("max_seconds", "on_truncated")}

    def open(
        self, path: str | Path, backbone: Backbone, sound: str | Path | None = None
    ) -> tuple[MediaReader, StreamEncoder]:
        """Open a file and begin a stream of it; `sound` is a file that is heard instead of its own sound.

        Raises
        ------
        OmniMemError
            The chunk length does not fit the encoders, or the file cannot be read.
        """
        self.check(backbone)
        if not backbone.supports_audio and not probe(path).has_video:
            raise OmniMemError(f"{path}: no video, and {backbone.name} does not support audio")
        reader = open_media(
            path,
            audio_path=sound,
            fps=self.fps,
            chunk_seconds=self.chunk_seconds,
            audio=self.audio and backbone.supports_audio,
            short_side=self.short_side,
            max_seconds=self.max_seconds,
            on_truncated="warn" if self.on_truncated == "warn" else "error",
        )
        return reader, self.begin(reader.info, backbone)

    def begin(self, info: MediaInfo, backbone: Backbone) -> StreamEncoder:
        """Begin a stream of a clip, whoever reads it."""
        duration = info.duration
        if self.max_seconds is not None:
            duration = self.max_seconds if duration is None else min(duration, self.max_seconds)
        return backbone.stream_encoder(
            video=info.has_video,
            audio=info.has_audio and self.audio and backbone.supports_audio,
            fps=self.fps,
            duration=duration,
            time_scale=self.time_scale,
            max_pixels=self.max_pixels,
            position_layout=self.position_layout,
            timestamps=self.timestamps,
        )


@dataclass(frozen=True)
class StreamEvent:
    """Progress of a stream, after each chunk.

    Attributes
    ----------
    chunk : int
        Number of the chunk.
    seconds : float
        Media read so far.
    duration : float or None
        Seconds the file says it has.
    new_positions : int
        Positions this chunk brought.
    retained : dict
        Mean number of text, visual and audio positions a layer keeps.
    bytes : int
        Bytes the memory occupies, buffers included.
    state_bytes : int
        Bytes of the retained keys and values.
    last : bool
        Whether the media has ended.
    """

    chunk: int
    seconds: float
    duration: float | None
    new_tokens: int
    retained: dict[str, float]
    bytes: int
    kv_bytes: int
    last: bool


class StreamingSession:
    """Watch media with a bounded memory and ask about them.

    Parameters
    ----------
    backbone : Backbone
        The model, with its adapter merged or injected if it has one.
    profile : BudgetProfile
        Budget of each layer.
    method : str
        Selection method, see `SELECTION_METHODS`.
    settings : StreamSettings
        How media are read.
    **options
        Hyper-parameters of the method.
    """

    def __init__(
        self,
        backbone: Backbone,
        profile: BudgetProfile,
        method: str = "omnimem",
        settings: StreamSettings | None = None,
        **options: Any,
    ) -> None:
        profile.check_model(backbone.config)
        self.backbone = backbone
        self.profile = profile
        self.settings = settings or StreamSettings.fitting(backbone)
        self.method = method
        self.memory = CompressedCache(profile, build_selection(method, **options))
        self._stream = Stream(backbone, self.memory)
        self._encoder: StreamEncoder | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        adapter: str | Path | None = None,
        profile: BudgetProfile | str | Path | None = None,
        method: str | None = None,
        settings: dict[str, Any] | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "auto",
        mean_budget: int | None = None,
        ratio: float | None = None,
        **options: Any,
    ) -> StreamingSession:
        """Load a checkpoint, a merged export or a training run.

        Parameters
        ----------
        path : str or Path
            Folder or hub id of a model, ``tiny``, or a run directory (its base and profile are found through it).
        adapter : str or Path, optional
            LoRA adapter to put on the model.
        profile : BudgetProfile or path, optional
            Budgets; by default the profile saved beside the model or adapter, else a uniform one of mean 8192.
        method : str, optional
            Selection method; by default the one the profile records, else ``omnimem``.
        settings : dict, optional
            Fields of `StreamSettings` that differ from what the profile records.
        dtype, device
            See `load_backbone`.
        mean_budget, ratio : int, float, optional
            Use a uniform profile of this mean (8192) and visual to audio ratio (5) instead of the saved one.
        **options
            Hyper-parameters of the method that differ from what the profile records.

        Raises
        ------
        OmniMemError
            Anything that does not load or fit together.
        """
        base, adapter = resolve_checkpoint(path, adapter)
        saved = [Path(place) / PROFILE_FILE for place in (adapter, path) if place is not None]
        if not isinstance(profile, BudgetProfile):
            file = profile or next((file for file in saved if file.is_file()), None)
            profile = None if file is None else BudgetProfile.load(file)
        backbone = load_backbone(base, dtype=dtype, device=device)
        if adapter is not None:
            load_adapter(backbone, adapter)
        if profile is None or mean_budget is not None or ratio is not None:
            recorded = {} if profile is None else {"selection": profile.selection, "stream": profile.stream}
            ratio = (ratio or 5.0) if backbone.supports_audio else math.inf
            uniform = BudgetProfile.uniform(backbone.config, mean_budget or 8192, ratio, backbone.model_id)
            profile = replace(uniform, **recorded)
        recorded = dict(profile.selection)
        recorded_method = recorded.pop("method", "omnimem")
        chosen: str = method or recorded_method
        # Another method or variant is a whole other setting, so the recorded switches do not carry over to it.
        if chosen == recorded_method and options.get("variant") in (None, recorded.get("variant")):
            options = {**recorded, **options}
        known = {field.name for field in fields(StreamSettings)}
        given = {**{k: v for k, v in profile.stream.items() if k in known}, **(settings or {})}
        return cls(backbone, profile, chosen, StreamSettings.fitting(backbone, **given), **options)

    @torch.no_grad()
    def watch(self, media: str | Path, **settings: Any) -> Iterator[StreamEvent]:
        """Stream a file into a fresh memory; ask whenever an event has come out.

        A thread decodes the next chunk while the model processes the present one.

        Parameters
        ----------
        media : str or Path
            The file.
        **settings
            Fields of `StreamSettings` that differ for this file.

        Yields
        ------
        StreamEvent
            After each chunk.
        """
        reader, encoder = replace(self.settings, **settings).open(media, self.backbone)
        yield from self.stream(reader, encoder, reader.info.duration)

    @torch.no_grad()
    def stream(
        self, chunks: Iterable[Chunk], encoder: StreamEncoder, duration: float | None = None
    ) -> Iterator[StreamEvent]:
        """Like `watch`, for chunks of an open file; `duration` in seconds is only passed on to the events."""
        self.memory.reset()
        self._encoder = encoder
        self._stream.forward(encoder.prefix(), text=True)
        for chunk in prefetch(chunks, 1):
            inputs = encoder.encode(chunk)
            self._stream.step(inputs)
            yield StreamEvent(
                chunk=chunk.index,
                seconds=chunk.t1,
                duration=duration,
                new_tokens=len(inputs),
                retained=self.memory.mean_token_counts(),
                bytes=self.memory.nbytes,
                kv_bytes=self.memory.kv_nbytes,
                last=chunk.last,
            )

    def ask(
        self, question: str, stream: bool = False, max_new_tokens: int = 256, **generation: Any
    ) -> str | Iterator[str]:
        """Answer from the present memory, which stays as it is.

        Parameters
        ----------
        question : str
            What to ask.
        stream : bool
            Yield text as it is generated instead of returning it whole.
        max_new_tokens : int
            Limit of the answer.
        **generation
            More arguments of `generate` (greedy by default).

        Returns
        -------
        str or iterator of str
            The answer.

        Raises
        ------
        OmniMemError
            Nothing has been watched yet, or the question is empty.
        """
        if self._encoder is None:
            raise OmniMemError("nothing watched yet: stream a file with watch() before asking")
        if not question.strip():
            raise OmniMemError("the question is empty")
        pieces = self._generate(question, max_new_tokens, generation)
        return pieces if stream else "".join(pieces)

    @torch.no_grad()
    def score_answer(self, question: str, answer: str) -> float:
        """How well the present memory, which stays as it is, predicts a given answer.

        Parameters
        ----------
        question, answer : str
            What is asked, and the answer whose tokens are forced.

        Returns
        -------
        float
            Mean negative log-likelihood of a token of the answer, the one that ends it included (nats).

        Raises
        ------
        OmniMemError
            Nothing has been watched yet.
        """
        if self._encoder is None:
            raise OmniMemError("nothing watched yet: stream a file with watch() before asking")
        question_ids, answer_ids = self.backbone.question_ids(question)[0], self.backbone.answer_ids(answer)[0]
        logits, targets = self._stream.answer_logits(self._encoder.closing(), [question_ids], [answer_ids])
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets).item()

    def _generate(self, question: str, max_new_tokens: int, generation: dict[str, Any]) -> Iterator[str]:
        backbone, abandoned = self.backbone, _Abandoned()
        streamer = TextIteratorStreamer(backbone.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []
        with self._question_inputs(question) as inputs:

            def work() -> None:
                try:
                    defaults = {
                        "do_sample": False,
                        "eos_token_id": backbone.end_token_ids,
                        "pad_token_id": backbone.tokenizer.pad_token_id,
                        "max_new_tokens": max_new_tokens,
                    }
                    criteria = StoppingCriteriaList([abandoned, *generation.pop("stopping_criteria", [])])
                    backbone.model.generate(
                        **inputs, **{**defaults, **generation}, streamer=streamer, stopping_criteria=criteria
                    )
                except BaseException as error:
                    failure.append(error)
                    streamer.end()

            worker = Thread(target=work, daemon=True)
            worker.start()
            try:
                yield from streamer
            finally:
                abandoned.stop = True
                worker.join()
        if failure:
            raise failure[0]

    @contextmanager
    def _question_inputs(self, question: str) -> Iterator[dict[str, Any]]:
        """Arguments of `generate` for a question on the present memory, valid inside the context."""
        assert self._encoder is not None
        with self.memory.scratch():
            with torch.no_grad():
                self._stream.forward(self._encoder.closing(), text=True)
            self.backbone.set_rope_deltas(self.memory.rope_deltas)
            ids = self.backbone.question_ids(question).to(self.backbone.device)
            stored = self.memory.get_seq_length()
            # Only the new ids go in. The mask spans them and what is stored: by its length generate() knows that they
            # are new, and their position ids follow from it and the rope deltas.
            mask = torch.ones(1, stored + ids.shape[1], dtype=torch.int64, device=ids.device)
            yield {"input_ids": ids, "attention_mask": mask, "past_key_values": self.memory}


class _Abandoned(StoppingCriteria):
    """Stops generation when nobody reads the answer any more."""

    stop = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.stop, device=input_ids.device)

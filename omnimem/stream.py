"""Stream media through a model with a bounded KV cache and ask questions at any time.

`StreamingSession` adds files, questions and generated text to the chunk-wise forward of `omnimem.forward`::

    session = StreamingSession.from_pretrained("runs/quickstart")
    for event in session.watch("clip.mp4"):
        print(event.seconds, event.retained)
    print(session.ask("What is heard?"))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from omnimem.backbones import Backbone, load_backbone
from omnimem.backbones.adapter import has_lora, load_adapter, resolve_checkpoint
from omnimem.backbones.base import StreamEncoder
from omnimem.budget import PROFILE_FILE, BudgetProfile, ModelFingerprint
from omnimem.budget.profile import DEFAULT_MEAN
from omnimem.errors import OmniMemError
from omnimem.forward import Stream
from omnimem.generation import generate_text
from omnimem.media import Chunk
from omnimem.media.prefetch import prefetch
from omnimem.memory import CompressedCache
from omnimem.memory.codec import KvDtype
from omnimem.memory.token_bytes import within
from omnimem.selection import build_selection
from omnimem.selection.heads import HeadMethod
from omnimem.selection.heads_file import HEADS_FILE, load_heads
from omnimem.stream_settings import StreamSettings


@dataclass(frozen=True)
class StreamEvent:
    """State of a stream after a chunk.

    Attributes
    ----------
    chunk : int
        Index of the chunk.
    seconds : float
        Seconds of media read so far.
    duration : float or None
        Length according to the file's header.
    new_tokens : int
        Tokens of this chunk.
    retained : dict
        Mean number of retained text, visual and audio tokens per layer.
    resident_bytes : int
        Bytes of the stored tokens, text included: keys, values and what is stored beside them.
    kv_bytes : int
        Bytes of their keys and values alone.
    allocated_bytes : int
        Bytes of the whole cache: its buffers have room for a chunk.
    peak_bytes : int
        Largest number of allocated bytes so far, while a chunk ran.
    last : bool
        Whether this is the last chunk.
    """

    chunk: int
    seconds: float
    duration: float | None
    new_tokens: int
    retained: dict[str, float]
    resident_bytes: int
    kv_bytes: int
    allocated_bytes: int
    peak_bytes: int
    last: bool


class StreamingSession:
    """Stream media into a bounded KV cache and answer questions about them.

    Parameters
    ----------
    backbone : Backbone
        The model, with its adapter (if any) merged or loaded.
    profile : BudgetProfile
        Budget of each layer.
    method : str
        Selection method, see `SELECTION_METHODS`.
    settings : StreamSettings
        How media are read.
    kv_dtype : {"auto", "fp8", "int8", "int4"}
        How stored keys and values are encoded, see `CompressedCache`.
    heads : path, optional
        Heads file (``selection.safetensors``) for ``method="learned"``.
    **options
        Hyper-parameters of the method.

    Raises
    ------
    OmniMemError
        The profile belongs to another model; method or options are unknown; heads are missing or do not fit.
    """

    def __init__(
        self,
        backbone: Backbone,
        profile: BudgetProfile,
        method: str = "omnimem",
        settings: StreamSettings | None = None,
        kv_dtype: KvDtype = "auto",
        heads: str | Path | None = None,
        **options: Any,
    ) -> None:
        profile.check_model(backbone.config)
        self.backbone = backbone
        self.profile = profile
        self.settings = settings or StreamSettings.for_backbone(backbone)
        self.method = method
        selection = build_selection(method, **options)
        if isinstance(selection, HeadMethod) and heads is not None:
            dtype = torch.promote_types(backbone.model.dtype, torch.float32)
            fingerprint, channels = ModelFingerprint.of(backbone.config), backbone.language_model.config.hidden_size
            expected = profile.selection_heads
            load_heads(Path(heads), selection, fingerprint, channels, expected, device=backbone.device, dtype=dtype)
        self.heads = heads
        self.cache = CompressedCache(profile, selection, kv_dtype=kv_dtype)
        self._stream = Stream(backbone, self.cache)
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
        gib: float | None = None,
        kv_dtype: KvDtype | None = None,
        **options: Any,
    ) -> StreamingSession:
        """Load a checkpoint, a merged export or a training run.

        Parameters
        ----------
        path : str or Path
            Folder or hub id of a model, ``tiny``, or a run directory (which names its base model and its profile).
        adapter : str or Path, optional
            LoRA adapter to load.
        profile : BudgetProfile or path, optional
            Default: the profile saved with the model or adapter, else a uniform one of mean budget 8192.
        method : str, optional
            Selection method. Default: the one recorded in the profile, else ``omnimem``.
        settings : dict, optional
            Fields of `StreamSettings` that override those recorded in the profile.
        dtype, device
            See `load_backbone`.
        mean_budget, ratio : int, float, optional
            Use a uniform profile of this mean budget (8192) and visual to audio ratio (5) instead of the saved one.
        gib : float, optional
            Scale the profile to the largest mean budget whose retained visual and audio tokens, with everything stored
            beside them, take at most so many GiB; excludes `mean_budget`.
        kv_dtype : {"auto", "fp8", "int8", "int4"}, optional
            How stored keys and values are encoded. Default: as recorded in the profile, else ``auto``.
        **options
            Hyper-parameters of the method that override those recorded in the profile.

        Raises
        ------
        OmniMemError
            The checkpoint cannot be loaded, or model, adapter and profile do not belong together; `gib` is too small.
        """
        if gib is not None and mean_budget is not None:
            raise OmniMemError("the mean budget and the GiB both set the size of the memory: give one of them")
        base, adapter = resolve_checkpoint(path, adapter)
        saved = [Path(place) / PROFILE_FILE for place in (adapter, path) if place is not None]
        if not isinstance(profile, BudgetProfile):
            file = profile or next((file for file in saved if file.is_file()), None)
            profile = None if file is None else BudgetProfile.load(file)
        backbone = load_backbone(base, dtype=dtype, device=device)
        if adapter is not None and has_lora(adapter):
            load_adapter(backbone, adapter)
        if profile is None or mean_budget is not None or ratio is not None:
            recorded = {}
            if profile is not None:
                names = ("selection", "selection_heads", "stream")
                recorded = {name: getattr(profile, name) for name in names}
            ratio = (ratio or 5.0) if backbone.supports_audio else math.inf
            uniform = BudgetProfile.uniform(backbone.config, mean_budget or DEFAULT_MEAN, ratio, backbone.model_id)
            profile = replace(uniform, **recorded)
        recorded = dict(profile.selection)
        recorded_method = recorded.pop("method", "omnimem")
        chosen: str = method or recorded_method
        # Recorded options belong to the recorded method and variant; they are not used for another one.
        if chosen == recorded_method and options.get("variant") in (None, recorded.get("variant")):
            options = {**recorded, **options}
        known = {field.name for field in fields(StreamSettings)}
        given = {**{k: v for k, v in profile.stream.items() if k in known}, **(settings or {})}
        stored: KvDtype = kv_dtype or profile.stream.get("kv_dtype", "auto")
        if gib is not None:
            profile = within(profile, gib, backbone, build_selection(chosen, **options), stored)
        heads = Path(adapter or path) / HEADS_FILE
        return cls(backbone, profile, chosen, StreamSettings.for_backbone(backbone, **given), stored, heads, **options)

    @torch.no_grad()
    def watch(self, media: str | Path, **settings: Any) -> Iterator[StreamEvent]:
        """Stream a file into an empty cache; `ask` may be called after every event.

        A thread decodes the next chunk while the model processes the current one.

        Parameters
        ----------
        media : str or Path
            The file.
        **settings
            Fields of `StreamSettings` to override for this file.

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
        """Like `watch`, for the chunks of an open file; `duration` in seconds is only reported in the events."""
        self.cache.reset()
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
                retained=self.cache.mean_token_counts(),
                resident_bytes=self.cache.resident_nbytes,
                kv_bytes=self.cache.kv_nbytes,
                allocated_bytes=self.cache.nbytes,
                peak_bytes=self.cache.peak_nbytes,
                last=chunk.last,
            )

    def ask(
        self, question: str, stream: bool = False, max_new_tokens: int = 256, **generation: Any
    ) -> str | Iterator[str]:
        """Answer a question from the cache, which is left unchanged.

        Parameters
        ----------
        question : str
        stream : bool
            Yield the text while it is generated instead of returning it at the end.
        max_new_tokens : int
            Longest answer in tokens.
        **generation
            Further arguments of `generate` (greedy by default).

        Returns
        -------
        str or iterator of str
            The answer.

        Raises
        ------
        OmniMemError
            No media has been streamed yet, or the question is empty.
        """
        if self._encoder is None:
            raise OmniMemError("no media streamed yet: call watch() before asking")
        if not question.strip():
            raise OmniMemError("the question is empty")
        pieces = self._generate(question, max_new_tokens, generation)
        return pieces if stream else "".join(pieces)

    @torch.no_grad()
    def score_answer(self, question: str, answer: str) -> float:
        """Negative log-likelihood of a given answer; the cache is left unchanged.

        Parameters
        ----------
        question, answer : str
            The question, and the answer whose tokens are scored.

        Returns
        -------
        float
            Mean over the answer's tokens, including the end-of-turn token, in nats per token.

        Raises
        ------
        OmniMemError
            No media has been streamed yet.
        """
        if self._encoder is None:
            raise OmniMemError("no media streamed yet: call watch() before asking")
        question_ids, answer_ids = self.backbone.question_ids(question)[0], self.backbone.answer_ids(answer)[0]
        logits, targets = self._stream.answer_logits(self._encoder.closing(), [question_ids], [answer_ids])
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets).item()

    def _generate(self, question: str, max_new_tokens: int, generation: dict[str, Any]) -> Iterator[str]:
        with self._question_inputs(question) as inputs:
            yield from generate_text(self.backbone, inputs, max_new_tokens, generation)

    @contextmanager
    def _question_inputs(self, question: str) -> Iterator[dict[str, Any]]:
        """Arguments of `generate` for a question about the cache, valid inside the context."""
        assert self._encoder is not None
        with self.cache.scratch():
            with torch.no_grad():
                self._stream.forward(self._encoder.closing(), text=True)
            self.backbone.set_rope_deltas(self.cache.rope_deltas)
            ids = self.backbone.question_ids(question).to(self.backbone.device)
            stored = self.cache.get_seq_length()
            # `input_ids` holds only the question. The mask covers the cached tokens as well: generate() infers from its
            # length that the ids are new, and computes their position ids from it and the rope deltas.
            mask = torch.ones(1, stored + ids.shape[1], dtype=torch.int64, device=ids.device)
            yield {"input_ids": ids, "attention_mask": mask, "past_key_values": self.cache}

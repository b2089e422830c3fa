"""``dry_run=true``: the token, memory and step plan of a run, computed without loading any weight.

accelerate launch train.py recipe=quickstart dry_run=true
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn

from data_prep.manifest import Row
from omnimem.backbones import Backbone
from omnimem.budget import BudgetProfile, ModelFingerprint
from omnimem.recipe import Recipe
from omnimem.selection import SelectionMethod
from omnimem.stream_settings import StreamSettings
from train.data import Samples, Schedule, info_of
from train.setup import add_lora, selection_of, settings_of

ADAM_BYTES = 4 + 4 + 8
"""Bytes a trained (float32) parameter takes: itself, its gradient, two moments."""

NF4_BYTES = 0.5 + 1 / 64 * (1 + 4 / 256)
"""Bytes of a weight in NF4: half of one, a byte of scale for each block of 64, a float for each 256 of those."""

RETAINED = "cache (all layers at budget)"
"""Name of the part that does not grow with the stream."""

WAITING = "evicted tokens kept for the backward,"
"""Name of the part that grows with the stream; on the device only under ``train.offload=none``."""


@dataclass(frozen=True)
class StreamPlan:
    """One row of the data: seconds, chunks, positions by modality, the largest chunk, tokens of the longest answer.

    The last is the text between the pictures, which stays in memory.
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
        """Visual and audio positions of the whole stream."""
        return self.visual + self.audio


def plan_stream(row: Row, backbone: Backbone, settings: StreamSettings) -> StreamPlan:
    """Positions a row's media will become, from its header; a file that does not say how long it is counts as 0 s."""
    info = info_of(row)
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


def memory_plan(
    recipe: Recipe, backbone: Backbone, profile: BudgetProfile, method: SelectionMethod, streams: list[StreamPlan]
) -> dict[str, int]:
    """Bytes of the parts of a training step for the longest stream, computed from shapes; call before LoRA is added."""
    text = backbone.config.text_config
    itemsize = backbone.model.dtype.itemsize
    projections = [m.weight for m in backbone.language_model.layers.modules() if isinstance(m, nn.Linear)]
    weights = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    if recipe.model.load_in_4bit:
        weights += round(sum(p.numel() * (NF4_BYTES - p.element_size()) for p in projections))
    peft_model = add_lora(recipe, backbone)
    trained = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    shape = ModelFingerprint.of(backbone.config)
    kv = 2 * shape.kv_heads * shape.head_dim * itemsize
    features = text.hidden_size * itemsize if method.stores_features else 0
    retained = sum(layer.total for layer in profile.layers)
    longest = max(streams, key=lambda stream: stream.tokens)
    layers, batch, chunk = text.num_hidden_layers, recipe.train.per_device_train_batch_size, longest.largest_chunk
    learning = recipe.selection.gradient != "none"
    margin = min(recipe.gate.margin or chunk, chunk) if learning else 0
    retained += layers * longest.text
    chunk += math.ceil(longest.text / max(1, longest.chunks))
    whole = longest.tokens + longest.text
    queries = text.num_attention_heads * shape.head_dim
    # Kept for the backward of one position and layer: two normalised inputs, residuals, q, k, v, attention output,
    # and the three wide tensors of the feed-forward block.
    inner = 3 * text.intermediate_size
    if experts := getattr(text, "num_experts_per_tok", 0):
        inner = experts * (text.hidden_size + 3 * text.moe_intermediate_size)
    activation = (5 * text.hidden_size + 3 * queries + inner) * itemsize + 2 * kv
    states = kv + (features if learning else 0)
    # Every position of the stream, in the margin or not, less what is still in the memory when the backward begins.
    left = max(0, whole * layers - retained)
    # Gradients of the memory are summed in float32; with a window, those of as many questions are kept apart.
    sums = min(recipe.train.bptt_window or 1, longest.questions) * max(itemsize, 4) / itemsize
    # And what went into the decoder, unless it is encoded again.
    maps = 1 + len(getattr(backbone.config.vision_config, "deepstack_visual_indexes", ()))
    inputs = 0 if recipe.lora.modules_to_save else whole * maps * text.hidden_size * itemsize
    waiting = batch * (left * (kv + features) + inputs)
    place = "on the device" if recipe.train.offload == "none" else f"in {recipe.train.offload} memory"
    return {
        "weights": weights,
        "adapter, gradients, optimizer": trained * ADAM_BYTES,
        RETAINED: batch * retained * (kv + features),
        "backward: restored cache, its gradient": round(batch * (retained + layers * chunk) * (2 + sums) * states),
        "margin of evicted positions": batch * layers * margin * kv,
        "activations of a chunk": batch * layers * chunk * activation,
        "logits of an answer": batch * longest.answer * text.vocab_size * 3 * 4,
        "the teacher's cache": batch * layers * whole * kv if recipe.distill.weight > 0 else 0,
        f"{WAITING} {place}": waiting,
    }


def print_plan(recipe: Recipe, rows: list[Row], backbone: Backbone, profile: BudgetProfile, processes: int = 1) -> None:
    """Print streams, steps and memory; `backbone` has shapes only (``meta`` device)."""
    settings, method = settings_of(recipe), selection_of(recipe)
    streams = [plan_stream(row, backbone, settings) for row in rows]
    schedule = Schedule(Samples(rows, backbone), recipe.train, recipe.data.shuffle, processes)
    console = Console()

    table = Table(title=f"{len(streams)} streams ({recipe.data.path})", title_justify="left")
    for column in ("stream", "seconds", "chunks", "visual", "audio", "largest chunk", "questions"):
        table.add_column(column, justify="left" if column == "stream" else "right")
    shown = streams if len(streams) <= 20 else sorted(streams, key=lambda s: -s.tokens)[:20]
    for s in shown:
        cells = (s.chunks, s.visual, s.audio, s.largest_chunk, s.questions)
        table.add_row(s.name, f"{s.seconds:.1f}", *(str(cell) for cell in cells))
    console.print(table)

    per_epoch = sum(stream.tokens for stream in streams)
    console.print(
        f"{schedule.steps} optimiser steps of {schedule.samples_per_step} stream(s), "
        f"{schedule.epoch(schedule.steps):.2f} epochs, about "
        f"{schedule.epoch(schedule.steps) * per_epoch:,.0f} positions"
    )
    console.print(
        f"memory of {profile.mean_budget:g} positions a layer ({profile.source}), selection {recipe.selection.method}"
    )
    parts = memory_plan(recipe, backbone, profile, method, streams)
    table = Table(
        title="tensors of a step, computed from shapes (without libraries and decoding)", title_justify="left"
    )
    table.add_column("part")
    table.add_column("MiB", justify="right")
    on_device = [size for name, size in parts.items() if WAITING not in name or recipe.train.offload == "none"]
    for name, size in {**parts, "sum on the device": sum(on_device)}.items():
        table.add_row(name, f"{size / 2**20:,.1f}")
    console.print(table)

"""Clips, chunk lengths and models for the tests that train every kind of backbone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimem.backbones import Backbone, load_backbone
from omnimem.budget import BudgetProfile
from omnimem.forward import Stream
from omnimem.memory import CompressedCache, SelectionGradient
from omnimem.recipe import Recipe, load_recipe
from small_runs import (
    RABBIT,
    SILENT,
    SPEECH,
    arguments,
)
from train.data import load_rows
from train.objective import StreamObjective
from train.samples import Sample, tokenize_row
from train.setup import add_lora, budget_profile, selection_method, stream_settings

TIMECODE = "speech_burned_in_timecode_42s.mp4"
LONG = {
    "media": TIMECODE,
    "questions": [
        {"question": "What is seen?", "answer": "A timecode.", "time": 30},
        {"question": "Who speaks?", "answer": "A man."},
    ],
}
SHORT = {
    "media": RABBIT,
    "questions": [
        {"question": "What is heard?", "answer": "Room noise.", "time": 4},
        {"question": "What is seen?", "answer": "A toy rabbit on a table."},
    ],
}
HEARD = {"media": SPEECH, "question": "What is heard?", "answer": "Two sentences about a film."}
SEEN = {"media": SILENT, "question": "What is seen?", "answer": "A mirror.", "time": 2}

CHUNKED = {
    "video_salmonn2": ("data.chunk_seconds=30", "memory.mean_budget=60"),
    "qwen3_omni": (),
    "llava_onevision": (),
    "qwen3_vl": (),
}
"""Its audio is encoded in segments of 30 s; the other models have four chunks of the shorter clip."""

MERGERS = {
    "video_salmonn2": "lora.modules_to_save=[visual,audio]",
    "qwen3_omni": "lora.modules_to_save=[visual,audio,audio_in,deepstack_0,deepstack_1,deepstack_2]",
    "llava_onevision": "lora.modules_to_save=[visual]",
}
DECODER, EVERYTHING = "decoder", "projectors"


@dataclass
class Setup:
    """A model with an adapter that is not zero, and its training samples."""

    recipe: Recipe
    backbone: Backbone
    model: Any
    profile: BudgetProfile
    samples: list[Sample]

    def objective(self, **options: Any) -> StreamObjective:
        learn = bool(self.recipe.lora.modules_to_save)
        return StreamObjective(
            self.backbone, self.model, self.profile, self.method, self.settings, train_encoders=learn, **options
        )

    @property
    def method(self):
        return selection_method(self.recipe)

    @property
    def settings(self):
        return stream_settings(self.recipe)

    @property
    def trained(self) -> dict[str, Tensor]:
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    def gradients(self) -> dict[str, Tensor]:
        """And forget them."""
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.trained.items()}
        self.model.zero_grad()
        return found


def setup(tmp_path: Path, tiny_of, name: str, *overrides: str, rows: list[dict]) -> Setup:
    settings = (f"model.backbone={name}", "model.dtype=float64", *CHUNKED[name], *overrides)
    recipe = load_recipe(arguments(tmp_path, *settings, rows=rows))
    backbone = load_backbone(tiny_of(name), dtype="float64", device="cpu")
    backbone.model.requires_grad_(False)
    profile = budget_profile(recipe, backbone, selection_method(recipe), stream_settings(recipe))
    model = add_lora(recipe, backbone)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    samples = [tokenize_row(row, backbone) for row in load_rows(recipe.data, backbone.supports_audio).rows]
    model.train()
    return Setup(recipe, backbone, model, profile, samples)


def plain(one: Setup, sample: Sample, gradient: SelectionGradient | None = None) -> Tensor:
    """Loss of one stream with a full autograd graph, encoders included."""
    stream = Stream(one.backbone, CompressedCache(one.profile, one.method, gradient))
    reader, encoder = one.settings.open(sample.row.media, one.backbone)
    stream.forward(encoder.prefix(), text=True)
    losses, pending = [], list(sample.questions)

    def ask() -> None:
        asked = pending.pop(0)
        logits, targets = stream.answer_logits(encoder.closing(), [asked.question], [asked.answer])
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))

    for chunk in reader:
        stream.step(encoder.encode(chunk))
        while pending and pending[0].time is not None and pending[0].time <= chunk.t1:
            ask()
    while pending:
        ask()
    return torch.stack(losses).sum()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-6) -> None:
    scale = max(float(one.abs().max()) for one in expected.values())
    for name, one in expected.items():
        own = float(one.abs().max())
        # A gradient that is zero but for rounding (keys' biases; one query attending to itself) has no scale.
        assert (found[name] - one).abs().max() <= limit * max(own, 1e-6 * scale), name

"""What tests of gradients share: a small float64 decoder with LoRA, streams for it, losses of questions on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from omnimem.backbones import ChunkInputs
from omnimem.forward import Stream
from omnimem.memory import CompressedCache, SelectionGradient, attach
from omnimem.selection import SelectionMethod, build_selection
from omnimem.selection.heads import HeadMethod
from oracles import batch_parts, offline, profile, run, stream_parts, text_model, text_part

BUDGETS = profile((3, 2), (2, 4), (5, 1))
SIZES = [(5, 3), (6, 2), (4, 4), (7, 3)]
OTHER_SIZES = [(4, 5), (6, 3)]
TARGETS = torch.randint(0, 11, (4,), generator=torch.Generator().manual_seed(3))
EVERY = SelectionGradient()


class ExactNorm(torch.nn.Module):
    """RMS normalisation all in float64: that of transformers rounds to float32 inside, which differences would see."""

    def __init__(self, stock):
        super().__init__()
        self.weight, self.epsilon = stock.weight, stock.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.epsilon)


@pytest.fixture(scope="module")
def model():
    return lora_decoder("q_proj", "v_proj", "o_proj")


def lora_decoder(*target_modules: str) -> Any:
    """Tiny decoder in float64 throughout, with LoRA on these projections and our hooks."""
    model: Any = text_model(layers=3)
    for layer in model.layers:
        layer.input_layernorm = ExactNorm(layer.input_layernorm)
        layer.post_attention_layernorm = ExactNorm(layer.post_attention_layernorm)
    model.norm = ExactNorm(model.norm)
    model.requires_grad_(False)
    attach(model)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=[*target_modules], init_lora_weights=False)
    return inject_adapter_in_model(config, model).double()


def lora_weights(model) -> list[Tensor]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def new_method(name: str, layers: int = 3, channels: int = 32, **options: Any) -> SelectionMethod:
    """A selection method; heads have random weights."""
    method = build_selection(name, **options)
    if isinstance(method, HeadMethod):
        generator = torch.Generator().manual_seed(4)
        for one in method.new_heads(layers, channels, torch.float64):
            for weight in one.parameters():
                weight.data += torch.randn(weight.shape, generator=generator, dtype=weight.dtype) / 4
    return method


def head_weights(method: SelectionMethod) -> list[Tensor]:
    """Weights of the heads of a method; none for a method without heads."""
    return [weight for one in getattr(method, "heads", None) or () for weight in one.parameters()]


def head() -> Tensor:
    return torch.randn(11, 32, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def new_cache(gradient: SelectionGradient | None = EVERY, method="omnimem", budgets=BUDGETS, **options) -> Any:
    return CompressedCache(budgets, new_method(method, **options), gradient)


def streams(samples: int) -> list[ChunkInputs]:
    """One stream, or two side by side of which the second ends early and whose chunks differ in length."""
    rows = [stream_parts(SIZES), stream_parts(OTHER_SIZES, prefix=5, seed=1)][:samples]
    return batch_parts(*rows) if samples > 1 else rows[0]


def answer(model, cache, seed: int = 50) -> Tensor:
    """Hidden states of a question asked now."""
    starts = cache.next_position_id.tolist()
    question = ChunkInputs.batch([text_part(4, start, seed=seed + i) for i, start in enumerate(starts)])
    with cache.scratch():
        return run(model, cache, question, text=True)


def answer_loss(hidden: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(row @ head().T, TARGETS) for row in hidden]).sum()


def streamed_loss(model, cache, parts: list[ChunkInputs], asked: tuple[int, ...] = (1, 3, 4)) -> Tensor:
    """Loss of questions asked after the chunks numbered `asked`."""
    flow = Stream(offline(model), cache)
    flow.forward(parts[0], text=True)
    losses = []
    for number, part in enumerate(parts[1:], start=1):
        flow.step(part)
        if number in asked:
            losses.append(answer_loss(answer(model, cache, seed=50 + number)))
    return torch.stack(losses).sum()


def weight_gradients(model, cache, parts, **options) -> list[Tensor]:
    return list(torch.autograd.grad(streamed_loss(model, cache, parts, **options), lora_weights(model)))


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference, measured by the largest entry."""
    largest = max(float(one.abs().max()) for one in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest


class Replay:
    """Record which columns selection keeps, then keep the same ones whatever the scores have become."""

    def __init__(self, monkeypatch):
        import omnimem.selection.base as module

        self.decide, self.recorded, self.place = module.keep_mask, [], None
        monkeypatch.setattr(module, "keep_mask", self)

    def __call__(self, score, table, budget):
        if self.place is None:
            self.recorded.append(self.decide(score, table, budget))
            return self.recorded[-1]
        self.place += 1
        return self.recorded[self.place - 1]

    def rewind(self):
        self.place = 0

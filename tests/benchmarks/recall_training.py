"""Training of heads and LoRA adapters on the recall task, through the compressed cache and its gradient."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from recall_task import BATCH, BUDGET, LAYERS, WIDTH, Recall, draw, loss_of
from torch import nn

from omnimem.budget import BudgetProfile, LayerBudget
from omnimem.memory import CompressedCache, SelectionGradient, attach
from omnimem.selection import SelectionMethod, build_selection

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 200
HEAD_RATE, LORA_RATE = 1e-2, 5e-3


@dataclass(frozen=True)
class Row:
    """One row of the results: a method, and what of it is trained.

    Attributes
    ----------
    method, options
        Arguments of `build_selection`.
    heads, lora : bool
        What is trained; neither: the row is free of training.
    gradient : bool
        Whether the gradient goes through the selection (straight-through); else through retained tokens alone.
    copies : int
        How often each fact is shown in training.
    budget : LayerBudget
        Budget of each layer in training.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    heads: bool = False
    lora: bool = False
    gradient: bool = True
    copies: int = 1
    budget: LayerBudget = BUDGET

    @property
    def trained(self) -> bool:
        """Whether anything is trained."""
        return self.heads or self.lora


def new_cache(method: SelectionMethod, budget: LayerBudget, gradient: bool = False) -> CompressedCache:
    """An empty cache with the same budget in every layer."""
    return CompressedCache(BudgetProfile((budget,) * LAYERS), method, SelectionGradient() if gradient else None)


def prepared(base: Recall, row: Row, seed: int) -> tuple[Recall, SelectionMethod]:
    """A copy of the base, with untrained adapters where the row trains them, and the method with untrained heads."""
    torch.manual_seed(1000 + seed)
    model = copy.deepcopy(base)
    attach(model.decoder)
    model.requires_grad_(False)
    if row.lora:
        get_peft_model(model.decoder, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    method = build_selection(row.method, **row.options)
    if row.heads:
        method.new_heads(LAYERS, WIDTH)  # pyright: ignore[reportAttributeAccessIssue]
    return model, method


def head_weights(method: SelectionMethod) -> list[nn.Parameter]:
    """Parameters of the heads of a method."""
    return [weight for head in getattr(method, "heads", None) or () for weight in head.parameters()]


def train(model: Recall, method: SelectionMethod, row: Row, seed: int, steps: int = STEPS) -> None:
    """Train what `prepared` made, with the compressed cache and the loss of the answers."""
    adapters = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [{"params": adapters, "lr": LORA_RATE}, {"params": head_weights(method), "lr": HEAD_RATE}]
    weights = [weight for group in groups for weight in group["params"]]
    optimiser = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(2000 + seed)
    for _ in range(steps):
        batch = draw(BATCH, generator, row.copies)
        loss = loss_of(model.streamed(batch, new_cache(method, row.budget, row.gradient)), batch)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()

"""Training of the rivals of learned retention, as their papers describe it: full attention with a bias per token.

The base is frozen and only heads are trained, with the steps and batches of `recall_training.train`. Rates and loss
weights were chosen on seeds 0, 1 and 2. Audio and visual tokens have their own targets, as they have own budgets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from recall_task import AUDIO_COUNT, BATCH, FACTS, VISUAL_COUNT, Batch, Recall, draw, loss_of
from recall_training import STEPS, Row
from torch import Tensor, nn

from omnimem.modality import AUDIO, VISUAL
from omnimem.selection.heads import RetentionMethod

WINDOW = VISUAL_COUNT + AUDIO_COUNT
"""Delay window of DMS: one chunk, after which the cache is compressed."""

BiasOf = Callable[[int, Tensor], Tensor]
"""Layer and input hidden states ``[B, T, C]`` -> what is added to the attention logits ``[B, T, T]``."""


def with_bias(model: Recall, batch: Batch, bias_of: BiasOf) -> Tensor:
    """Logits ``[B, FACTS, VALUES]`` of `Recall.full` with a bias in the attention of every layer."""
    decoder = model.decoder
    hidden = torch.cat((model.embed(batch), model.question(batch.asked)), 1)
    length = hidden.shape[1]
    position_ids = torch.arange(length).expand(3, len(hidden), -1)
    rotary = decoder.rotary_emb(hidden, position_ids)
    later = torch.full((length, length), torch.finfo(hidden.dtype).min).triu(1)
    for index, layer in enumerate(decoder.layers):
        mask = (later + bias_of(index, hidden).tril())[:, None]
        out: Any = layer(hidden, attention_mask=mask, position_embeddings=rotary, use_cache=False)
        hidden = out[0] if isinstance(out, tuple) else out
    return model.head(decoder.norm(hidden)[:, -FACTS:])


def fit(
    method: RetentionMethod, seed: int, copies: int, rate: float, steps: int, loss_at: Callable[[Batch, float], Tensor]
) -> None:
    """Minimise ``loss_at(batch, progress)`` over the heads."""
    assert method.heads is not None
    weights = [weight for head in method.heads for weight in head.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(2000 + seed)
    for step in range(steps):
        loss = loss_at(draw(BATCH, generator, copies), step / max(1, steps - 1))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()


def divergence(model: Recall, batch: Batch, logits: Tensor) -> Tensor:
    """Mean KL divergence of the answers from those of the model with a full cache."""
    with torch.no_grad():
        teacher = model.full(batch).log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1).flatten(0, 1), teacher.flatten(0, 1), reduction="batchmean", log_target=True)


def train_dms(
    model: Recall,
    method: RetentionMethod,
    row: Row,
    seed: int,
    rate: float = 3e-2,
    weight: float = 3.0,
    temperature: float = 0.3,
    ramp: float = 0.5,
    steps: int = STEPS,
) -> None:
    """DMS (arXiv 2506.05345): Gumbel-sigmoid evictions after a delay, their share raised to the target by a hinge."""

    def loss_at(batch: Batch, progress: float) -> Tensor:
        size = batch.modality.shape[1]
        age = torch.arange(size + FACTS)[:, None] - torch.arange(size)
        shares: list[Tensor] = []

        def bias_of(layer: int, hidden: Tensor) -> Tensor:
            logit = -method.head(layer)(hidden[:, :size])
            uniform = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)
            noisy = (logit + uniform.log() - (1 - uniform).log()) / temperature
            for kind, budget in ((VISUAL, row.budget.visual), (AUDIO, row.budget.audio)):
                of_kind = batch.modality == kind
                target = (1 - budget * len(of_kind) / of_kind.sum()) * min(1.0, progress / ramp)
                shares.append(F.relu(target - noisy.sigmoid()[of_kind].mean()))
            return F.pad(F.logsigmoid(-noisy)[:, None] * (age > WINDOW), (0, FACTS))

        quality = divergence(model, batch, with_bias(model, batch, bias_of))
        return quality + weight * torch.stack(shares).mean()

    fit(method, seed, row.copies, rate, steps, loss_at)


def train_trim_kv(
    model: Recall,
    method: RetentionMethod,
    row: Row,
    seed: int,
    rate: float = 3e-2,
    weight: float = 0.3,
    steps: int = STEPS,
) -> None:
    """TRIM-KV (arXiv 2512.03324): decaying gates in the attention, capacity loss, divergence and answers."""

    def loss_at(batch: Batch, progress: float) -> Tensor:
        size = batch.modality.shape[1]
        age = (torch.arange(size + FACTS)[:, None] - torch.arange(size)).clamp_min(0)
        excess: list[Tensor] = []

        def bias_of(layer: int, hidden: Tensor) -> Tensor:
            decayed = F.logsigmoid(method.head(layer)(hidden[:, :size]))[:, None] * age
            for kind, budget in ((VISUAL, row.budget.visual), (AUDIO, row.budget.audio)):
                gates = decayed[:, :size].exp().tril() * (batch.modality == kind)[:, None]
                excess.append(F.relu(gates.sum(-1) / budget - 1).mean())
            return F.pad(decayed, (0, FACTS))

        logits = with_bias(model, batch, bias_of)
        return divergence(model, batch, logits) + loss_of(logits, batch) + weight * torch.stack(excess).mean()

    fit(method, seed, row.copies, rate, steps, loss_at)


def train_kvzap(
    model: Recall,
    method: RetentionMethod,
    row: Row,
    seed: int,
    rate: float = 1e-2,
    questions_alone: bool = True,
    steps: int = STEPS,
) -> None:
    """KVzap (arXiv 2601.07891): regression to the log of the attention that later queries of the full model give."""
    teacher = Teacher(model)
    assert method.heads is not None
    generator = torch.Generator().manual_seed(2000 + seed)
    for layer, head in enumerate(method.heads):
        assert head.bias is not None
        first = teacher.observe(draw(BATCH, generator, row.copies), questions_alone)
        nn.init.constant_(head.bias, first[layer][1].mean().item())

    def loss_at(batch: Batch, progress: float) -> Tensor:
        observed = teacher.observe(batch, questions_alone)
        return torch.stack([F.mse_loss(method.head(i)(x), y) for i, (x, y) in enumerate(observed)]).sum()

    fit(method, seed, row.copies, rate, steps, loss_at)


class Teacher:
    """Measures, in a model with a full cache, the attention that media tokens receive from later queries.

    Parameters
    ----------
    model : Recall
        Copied.
    """

    def __init__(self, model: Recall) -> None:
        self.model = copy.deepcopy(model)
        self.model.decoder.set_attn_implementation("eager")
        self._inputs: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._first_query = 0
        for layer in self.model.decoder.layers:
            layer.register_forward_pre_hook(lambda _, args, kwargs: self._see(args, kwargs), with_kwargs=True)
            attention: Any = layer.self_attn
            attention.register_forward_hook(self._measure, with_kwargs=True)

    @torch.no_grad()
    def observe(self, batch: Batch, questions_alone: bool) -> list[tuple[Tensor, Tensor]]:
        """Input hidden states ``[B, M, C]`` and log scores ``[B, M]`` of the M media tokens in every layer.

        With `questions_alone` false, tokens that are more than one chunk later are queries too.
        """
        size = batch.modality.shape[1]
        self._inputs, self._scores = [], []
        self._first_query = size if questions_alone else WINDOW
        self.model.full(batch)
        return [(x[:, :size], y[:, :size]) for x, y in zip(self._inputs, self._scores, strict=True)]

    def _see(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self._inputs.append(args[0] if args else kwargs["hidden_states"])

    def _measure(self, attention: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        hidden, weights = args[0] if args else kwargs["hidden_states"], output[1]
        length, heads = hidden.shape[1], weights.shape[1]
        value = attention.v_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        value = value.repeat_interleave(heads // value.shape[1], 1)
        projection = attention.o_proj.weight.T.unflatten(0, (heads, -1))
        moved = (value @ projection).norm(dim=-1)
        received = weights * moved[:, :, None] / hidden.norm(dim=-1)[:, None, :, None]
        index = torch.arange(length)
        later = (index[:, None] - index > WINDOW) & (index >= self._first_query)[:, None]
        later |= (index >= length - FACTS)[:, None]
        received = received.masked_fill(~later, 0).amax((1, 2))
        self._scores.append(received.clamp_min(1e-9).log())


TRAINING: dict[str, Callable[..., None]] = {"dms": train_dms, "trim_kv": train_trim_kv, "kvzap": train_kvzap}
"""Training of each rival."""

OPTIONS: dict[str, dict[str, Any]] = {"dms": {}, "trim_kv": {}, "kvzap": {}}
"""Options of each rival."""

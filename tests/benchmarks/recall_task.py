"""Streaming recall: the task, the model and its training with a full cache.

A stream has 6 chunks of 18 visual and 6 audio tokens: 9 facts (a key and its value) at random positions, in every chunk
7 visual and 2 audio distractors (facts whose keys are never asked for), and repeating background. After the stream
every fact is asked for. In the *plain* regime every fact is shown once, in the *repeated* regime three times, at
different moments. 9 visual and 4 audio tokens per layer are just enough for all facts, if none is retained twice.

The task measures which tokens the cache retains, not language understanding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5OmniTextConfig, Qwen2_5OmniThinkerTextModel

from omnimem.budget import LayerBudget
from omnimem.memory import CompressedCache
from omnimem.modality import AUDIO, VISUAL

CHUNKS, VISUAL_COUNT, AUDIO_COUNT = 6, 18, 6
FACTS, DISTRACTORS = 9, (7, 2)
KEYS, ASKED, VALUES, BACKGROUNDS = 32, 16, 16, 8
WIDTH, LAYERS = 64, 3
BATCH, TEST = 16, 256
BUDGET = LayerBudget(visual=9, audio=4)

REGIMES = {"plain": 1, "repeated": 3}
"""How often each fact is shown."""


@dataclass
class Batch:
    """B streams: ids ``[B, T]`` of key, value and background of each token (-1: none), modality, questions, answers."""

    key: Tensor
    value: Tensor
    background: Tensor
    modality: Tensor
    asked: Tensor
    answer: Tensor


def draw(batch: int, generator: torch.Generator, copies: int = 1) -> Batch:
    """Random streams with random facts, each shown `copies` times."""
    size = VISUAL_COUNT + AUDIO_COUNT
    total = CHUNKS * size
    key, value = torch.full((batch, total), -1), torch.full((batch, total), -1)
    modality = torch.empty(batch, total, dtype=torch.int64)
    run = torch.randint(0, BACKGROUNDS, (batch, CHUNKS), generator=generator)
    background = run.repeat_interleave(size, 1)
    asked = torch.stack([torch.randperm(ASKED, generator=generator)[:FACTS] for _ in range(batch)])
    answer = torch.randint(0, VALUES, (batch, FACTS), generator=generator)
    for b in range(batch):
        free = []
        for chunk in range(CHUNKS):
            order = chunk * size + torch.randperm(size, generator=generator)
            seen, heard = order[:VISUAL_COUNT], order[VISUAL_COUNT:]
            modality[b, seen], modality[b, heard] = VISUAL, AUDIO
            for places, count in ((seen, DISTRACTORS[0]), (heard, DISTRACTORS[1])):
                key[b, places[:count]] = torch.randint(ASKED, KEYS, (count,), generator=generator)
                value[b, places[:count]] = torch.randint(0, VALUES, (count,), generator=generator)
            free += [seen[DISTRACTORS[0] :], heard[DISTRACTORS[1] :]]
        places = torch.cat(free)
        places = places[torch.randperm(len(places), generator=generator)]
        # No modality has more facts than its budget, so that a perfect selection answers everything.
        kinds = modality[b, places]
        heard = places[kinds == AUDIO][: int(torch.randint(1, BUDGET.audio, (1,), generator=generator))]
        seen = places[kinds == VISUAL]
        chosen = torch.cat((heard, seen[: FACTS - len(heard)]))
        key[b, chosen], value[b, chosen] = asked[b], answer[b]
        # Copies of a fact are tokens of its own modality.
        spare = {AUDIO: places[kinds == AUDIO][len(heard) :].tolist(), VISUAL: seen[FACTS - len(heard) :].tolist()}
        for fact, place in enumerate(chosen.tolist()):
            for _ in range(copies - 1):
                other = spare[int(modality[b, place])].pop()
                key[b, other], value[b, other] = asked[b, fact], answer[b, fact]
    background[key >= 0] = -1
    return Batch(key, value, background, modality, asked, answer)


class Recall(nn.Module):
    """Embeddings of the task, a transformers decoder, and a classification head over values."""

    def __init__(self) -> None:
        super().__init__()
        config = Qwen2_5OmniTextConfig(
            vocab_size=8,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4},
        )
        self.decoder = Qwen2_5OmniThinkerTextModel(config)
        self.key, self.value = nn.Embedding(KEYS, WIDTH), nn.Embedding(VALUES, WIDTH)
        self.background, self.kind = nn.Embedding(BACKGROUNDS, WIDTH), nn.Embedding(3, WIDTH)
        self.question = nn.Embedding(ASKED, WIDTH)
        self.head = nn.Linear(WIDTH, VALUES)

    def embed(self, batch: Batch) -> Tensor:
        """Input embeddings of the media ``[B, T, C]``."""
        parts = ((self.key, batch.key), (self.value, batch.value), (self.background, batch.background))
        held = sum(table(ids.clamp_min(0)) * (ids >= 0)[..., None] for table, ids in parts)
        return held + self.kind(batch.modality)

    def full(self, batch: Batch) -> Tensor:
        """Logits ``[B, FACTS, VALUES]`` from one causal forward over the whole stream."""
        embeds = torch.cat((self.embed(batch), self.question(batch.asked)), 1)
        position_ids = torch.arange(embeds.shape[1]).expand(3, len(embeds), -1)
        hidden = self.decoder(inputs_embeds=embeds, position_ids=position_ids, use_cache=False).last_hidden_state
        return self.head(hidden[:, -FACTS:])

    def streamed(self, batch: Batch, cache: CompressedCache) -> Tensor:
        """The same logits from a stream through `cache`."""
        embeds, size = self.embed(batch), VISUAL_COUNT + AUDIO_COUNT
        for chunk in range(CHUNKS):
            part = slice(chunk * size, (chunk + 1) * size)
            self._run(embeds[:, part], part.start, cache, batch.modality[:, part])
            cache.compress()
        with cache.scratch():
            return self.head(self._run(self.question(batch.asked), CHUNKS * size, cache, None))

    def _run(self, embeds: Tensor, start: int, cache: CompressedCache, modality: Tensor | None) -> Tensor:
        position_ids = (start + torch.arange(embeds.shape[1])).expand(3, len(embeds), -1)
        return self.decoder(
            inputs_embeds=embeds, position_ids=position_ids, past_key_values=cache, use_cache=True, modality=modality
        ).last_hidden_state


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answers."""
    return F.cross_entropy(logits.flatten(0, 1), batch.answer.flatten())


def accuracy(model: Recall, make_cache: Callable[[], CompressedCache] | None, batch: Batch) -> float:
    """Share of correct answers at inference; `make_cache` None: with a full cache."""
    with torch.no_grad():
        logits = model.full(batch) if make_cache is None else model.streamed(batch, make_cache())
    return (logits.argmax(-1) == batch.answer).float().mean().item()


def train_base(path: Path, steps: int) -> Recall:
    """The model trained with a full cache; loaded from `path` if the file exists."""
    torch.manual_seed(0)
    model = Recall()
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps, pct_start=0.1)
    for step in range(steps):
        batch = draw(32, generator)
        loss = loss_of(model.full(batch), batch)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"base step {step}: loss {loss.item():.3f}", flush=True)
    torch.save(model.state_dict(), path)
    return model

"""What the tests compare against: plain loops, dense attention and hand-made streams, none of it the library's code."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5OmniTextConfig, Qwen2_5OmniThinkerTextModel

from omnimem.backbones import ChunkInputs
from omnimem.budget import BudgetProfile, LayerBudget
from omnimem.modality import AUDIO, TEXT, VISUAL

WIDTH = 32


def text_model(layers: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Qwen2_5OmniThinkerTextModel:
    """A random Qwen2.5-Omni decoder of width 32 with 4 heads and 2 key-value heads, nothing attached."""
    config = Qwen2_5OmniTextConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
        pad_token_id=0,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5OmniThinkerTextModel(config)
    return model.to(dtype).eval()


def profile(*budgets: tuple[int, int]) -> BudgetProfile:
    """Profile of (visual, audio) pairs."""
    return BudgetProfile(tuple(LayerBudget(visual=v, audio=a) for v, a in budgets))


def text_part(length: int, start: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> ChunkInputs:
    """Text of one sample whose rotary ids count up from `start`."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    return ChunkInputs.text(torch.randn(1, length, WIDTH, generator=generator).to(dtype), start)


def media_part(
    visual: int, audio: int, start: int, time: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> ChunkInputs:
    """A chunk of one sample: visual and audio tokens shuffled together, with gapped three-row rotary ids."""
    generator = torch.Generator().manual_seed(seed)
    length = visual + audio
    kinds = torch.tensor([VISUAL] * visual + [AUDIO] * audio, dtype=torch.int8)
    kinds = kinds[torch.randperm(length, generator=generator)]
    ids = start + torch.arange(length).div(2, rounding_mode="floor") * 3
    height = torch.randint(0, 4, (length,), generator=generator)
    width = torch.randint(0, 4, (length,), generator=generator)
    seen = kinds == VISUAL
    positions = torch.stack((ids, torch.where(seen, start + height, ids), torch.where(seen, start + width, ids)))
    return ChunkInputs(
        embeds=torch.randn(1, length, WIDTH, generator=generator).to(dtype),
        position_ids=positions[:, None],
        modality=kinds[None],
        time=(time + torch.arange(length) / max(length, 1))[None],
        next_position_id=torch.tensor([start + (3 * length) // 2 + 5]),
    )


def idle_part(next_position_id: int, dtype: torch.dtype = torch.float64) -> ChunkInputs:
    """No tokens, for a stream that has ended."""
    inputs = text_part(0, 0, dtype=dtype)
    return ChunkInputs(
        inputs.embeds, inputs.position_ids, inputs.modality, inputs.time, torch.tensor([next_position_id])
    )


def stream_parts(
    sizes: list[tuple[int, int]], prefix: int = 3, seed: int = 0, dtype=torch.float64
) -> list[ChunkInputs]:
    """A prefix of text and chunks of (visual, audio) tokens, each starting where the last one ended."""
    parts = [text_part(prefix, 0, seed, dtype)]
    for number, (visual, audio) in enumerate(sizes):
        start = int(parts[-1].next_position_id[0])
        parts.append(media_part(visual, audio, start, float(number), 100 * seed + number, dtype))
    return parts


def run(model, cache, inputs: ChunkInputs, text: bool = False) -> Tensor:
    """One forward pass of a decoder with the memory."""
    return model(
        inputs_embeds=inputs.embeds,
        position_ids=inputs.position_ids,
        attention_mask=inputs.valid,
        past_key_values=cache,
        use_cache=True,
        modality=None if text else inputs.modality,
        time=inputs.time,
        next_position_id=inputs.next_position_id,
    ).last_hidden_state


def step(model, cache, inputs: ChunkInputs) -> Tensor:
    """A chunk as `omnimem.forward.Stream` takes it: ids placed, forward, the method's probes, compression."""
    positions, following = cache.assign_position_ids(
        inputs.position_ids, inputs.modality, inputs.valid, inputs.next_position_id
    )
    hidden = run(model, cache, replace(inputs, position_ids=positions, next_position_id=following))
    with torch.no_grad():
        for number, probe in enumerate(cache.method.probes):
            embeds = probe_embeds(number, len(inputs.embeds), inputs.embeds.dtype)
            with cache.probing(probe, embeds):
                run(model, cache, ChunkInputs.text(embeds, cache.next_position_id), text=True)
    cache.compress()
    return hidden


def probe_embeds(number: int, batch: int, dtype=torch.float64) -> Tensor:
    """Embeddings of a method's probes, which stand for their texts."""
    generator = torch.Generator().manual_seed(77 + number)
    return torch.randn(1, 3 + number, WIDTH, generator=generator).to(dtype).expand(batch, -1, -1)


def stream(model, cache, parts: list[ChunkInputs]) -> list[Tensor]:
    """Prefix, then every chunk with compression after it; the hidden states of each."""
    cache.assign_position_ids(
        parts[0].position_ids, parts[0].modality, parts[0].valid, parts[0].next_position_id, text=True
    )
    return [run(model, cache, parts[0], text=True), *(step(model, cache, part) for part in parts[1:])]


def kept(cache, layer: int, sample: int = 0) -> list[int]:
    """Stream indices stored in a layer for one sample, in stored order."""
    table = cache.token_metadata(layer)
    return table.index[sample][table.valid[sample]].tolist()


def batch_parts(*streams: list[ChunkInputs]) -> list[ChunkInputs]:
    """Streams side by side; one that has ended waits."""
    longest = max(len(parts) for parts in streams)
    rows = [[*parts, *[idle_part(int(parts[-1].next_position_id[0]))] * (longest - len(parts))] for parts in streams]
    return [ChunkInputs.batch(list(one)) for one in zip(*rows, strict=True)]


@contextlib.contextmanager
def slopes_of(weights: list[Tensor], loss: Callable[[], float]) -> Iterator[Callable[[list[Tensor], float], float]]:
    """Slope of a loss along a direction by a fourth-order difference (error of order h^4); weights are put back."""
    originals = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def at(step: float, direction: list[Tensor]) -> float:
        for weight, original, along in zip(weights, originals, direction, strict=True):
            weight.copy_(original + step * along)
        return loss()

    def slope(direction: list[Tensor], h: float) -> float:
        near = at(h, direction) - at(-h, direction)
        far = at(2 * h, direction) - at(-2 * h, direction)
        return (8 * near - far) / (12 * h)

    try:
        yield slope
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)


def offline(model) -> Any:
    """As much of a backbone as a stream needs: tokens are the letters of a text, a turn ends with token 63."""

    def text_ids(text: str) -> Tensor:
        return torch.tensor([[ord(letter) % 60 for letter in text]])

    return SimpleNamespace(
        language_model=model,
        device=torch.device("cpu"),
        spatial_ids_advance=False,
        text_ids=text_ids,
        question_ids=lambda text: torch.cat((text_ids(text), torch.tensor([[63]])), 1).long(),
        embed=model.get_input_embeddings(),
    )


def held(cache) -> list[Tensor]:
    """Copies of everything a memory holds: states, facts, attention scores, features, counters of all layers."""
    tensors = []
    for layer in cache.layers:
        table = layer.metadata
        tensors += [layer.keys, layer.values, table.index, table.position_ids, table.time, table.modality, table.valid]
        if layer.attention_scores is not None:
            # Mass may be stored for a part of the columns; the rest has none yet.
            tensors.append(
                torch.nn.functional.pad(layer.attention_scores, (0, len(table) - layer.attention_scores.shape[1]))
            )
        tensors += [] if layer.features is None else [layer.features]
        tensors.append(torch.tensor([list(sample.values()) for sample in layer.token_counts]))
    tensors += [cache.next_position_id, torch.tensor([cache.get_seq_length(), *cache.lengths()])]
    return [tensor.detach().clone().nan_to_num(-1) for tensor in tensors]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether two memories hold the same bits."""
    return len(before) == len(after) and all(map(torch.equal, before, after))


def dense_weights(query: Tensor, key: Tensor, valid: Tensor | None, scaling: float | None = None) -> Tensor:
    """Whole attention matrix ``[B, H, Q, K]`` of the last Q tokens; a padded query attends to nothing."""
    heads, dim = query.shape[1], query.shape[3]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    logits = query @ key.transpose(-1, -2) * (dim**-0.5 if scaling is None else scaling)
    return masked_softmax(logits, valid)


def masked_softmax(logits: Tensor, valid: Tensor | None) -> Tensor:
    """Softmax over the columns each query may see: real ones, up to itself."""
    batch, _, queries, keys = logits.shape
    real = [[True] * keys] * batch if valid is None else valid.tolist()
    past = keys - queries
    allowed = torch.tensor(
        [
            [[[real[b][past + q] and k <= past + q and real[b][k] for k in range(keys)] for q in range(queries)]]
            for b in range(batch)
        ]
    )
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    return weights.nan_to_num(0.0)


@contextlib.contextmanager
def largest_tensor() -> Iterator[list[int]]:
    """Records the number of elements of the largest tensor that any operation inside makes."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                # An expanded view has few elements of its own; what counts is what is stored.
                if isinstance(leaf, Tensor):
                    largest[0] = max(largest[0], leaf.untyped_storage().nbytes() // leaf.element_size())
            return result

    with Watch():
        yield largest


# ---- the selection methods, one token at a time -----------------------------------------------------------------


@dataclass
class Position:
    """One stored token of one sample in one layer, as plain Python numbers."""

    index: int
    kind: int
    key: list[list[float]]
    value: list[list[float]]
    hidden: list[float]
    mass: float = 0.0


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    return dot(a, b) / (math.sqrt(dot(a, a)) * math.sqrt(dot(b, b)))


def observed_mass(queries: list[list[list[float]]], stored: list[Position], kind: str, stride: int = 1) -> list[float]:
    """Mass each stored token receives from the queries ``[H][Q][D]``, the last Q: every `stride`-th from the end."""
    heads, count, dim = len(queries), len(queries[0]), len(queries[0][0])
    groups = len(stored[0].key)
    mass = [0.0] * len(stored)
    asked = range(count - 1, -1, -stride)
    for q in asked:
        visible = len(stored) - count + q + 1
        logits = [
            [dot(queries[h][q], stored[k].key[h * groups // heads]) / math.sqrt(dim) for k in range(visible)]
            for h in range(heads)
        ]
        if kind == "concat":
            logits = [[sum(column) / heads for column in zip(*logits, strict=True)]]
        for row in logits:
            top = max(row)
            weights = [math.exp(x - top) for x in row]
            total = math.fsum(weights)
            for k, weight in enumerate(weights):
                mass[k] += weight / total / len(logits) * count / len(asked)
    return mass


def redundancy_of(position: int, stored: list[Position], vectors: list[list[float]], neighbours: str) -> float:
    """½ [cos with the previous + cos with the next], a missing neighbour counting as 1."""
    same = [k for k in range(len(stored)) if neighbours == "sequence" or stored[k].kind == stored[position].kind]
    place = same.index(position)
    before = cosine(vectors[position], vectors[same[place - 1]]) if place > 0 else 1.0
    after = cosine(vectors[position], vectors[same[place + 1]]) if place + 1 < len(same) else 1.0
    return (before + after) / 2


def splitmix(x: int) -> int:
    """SplitMix64 of an unsigned 64-bit number."""
    limit = (1 << 64) - 1
    x = (x * 0x9E3779B97F4A7C15) & limit
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & limit
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & limit
    return x ^ (x >> 31)


def best_of(scores: list[float], stored: list[Position], visual: int, audio: int) -> list[int]:
    """Places of all text and of the best `visual` and `audio` tokens; the later one wins a tie."""
    keep = {k for k, position in enumerate(stored) if position.kind == TEXT}
    for kind, budget in ((VISUAL, visual), (AUDIO, audio)):
        places = [k for k, position in enumerate(stored) if position.kind == kind]
        places.sort(key=lambda k: (-scores[k], -k))
        keep.update(places[:budget])
    return sorted(keep)

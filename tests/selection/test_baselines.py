"""The rival methods keep, and merge, exactly what their descriptions say.

`Simulated` holds every stream as a list of `Held` tokens whose keys are complex numbers without rotation: pair j is
coordinate j plus i times coordinate j + D/2, and a rotation is a product with e^(iφ). Attention is dense.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from omnimem.errors import OmniMemError
from omnimem.forward import Stream
from omnimem.memory import CompressedCache, attach
from omnimem.memory.attach import compressed_attention
from omnimem.memory.rotary import Rotary
from omnimem.modality import AUDIO, TEXT, VISUAL
from omnimem.selection import SELECTION_METHODS, build_selection
from omnimem.selection.hermes import GLOBAL, LOCAL
from omnimem.selection.sketch import sketch
from oracles import (
    WIDTH,
    batch_parts,
    best_of,
    cosine,
    held,
    probe_embeds,
    profile,
    redundancy_of,
    same,
    stream,
    stream_parts,
    text_model,
)
from small_decoder import new_method

METHODS = [
    ("streaming_llm", {}),
    ("streaming_llm", {"num_sink_tokens": 0}),
    ("streaming_llm", {"num_sink_tokens": 9}),
    ("streaming_llm", {"num_sink_tokens": 9, "position_ids": "original"}),
    ("h2o", {}),
    ("h2o", {"position_ids": "compact"}),
    ("snapkv", {}),
    ("snapkv", {"window_size": 4, "kernel_size": 3}),
    ("snapkv", {"window_size": 1, "kernel_size": 1}),
    ("snapkv", {"window_size": 7, "kernel_size": 9, "position_ids": "compact"}),
    ("infinipot_v", {}),
    ("infinipot_v", {"share": 0.8, "recent": 0.5}),
    ("infinipot_v", {"share": 1.0, "recent": 0.0}),
    ("infinipot_v", {"share": 0.0, "recent": 1.0}),
    ("infinipot_v_released", {}),
    ("infinipot_v_released", {"share": 1.0, "recent": 0.4}),
    ("streammem", {}),
    ("streammem", {"position_ids": "compact"}),
    ("hermes", {}),
    ("hermes", {"position_ids": "original"}),
    ("hermes_released", {}),
    ("attention_only", {}),
    ("attention_only", {"query_stride": 3}),
    ("similarity_only", {}),
    ("similarity_only", {"redundancy": "sketch", "sketch_dim": 16, "seed": 3}),
    ("similarity_only", {"redundancy": "key", "neighbours": "modality"}),
    ("similarity_only", {"redundancy": "value"}),
    ("novelty", {}),
    ("novelty", {"novelty": "every_chunk", "lambda": 0.5, "query_stride": 2, "sketch_dim": 12, "sketch_bits": 4}),
    ("learned", {"sketch_dim": 5}),
    ("learned", {"novelty": "every_chunk", "attention_term": True, "age_term": True, "sketch_bits": 4, "seed": 2}),
    ("dms", {}),
    ("trim_kv", {}),
    ("kvzap", {}),
    ("kvzap", {"head_hidden_size": 3, "seed": 1}),
]

NOVELTY = {"novelty": "arrival", "sketch_dim": 32, "sketch_bits": 8, "query_stride": 4, "seed": 0}
DEFAULTS = {
    "streaming_llm": {"num_sink_tokens": 4},
    "h2o": {},
    "snapkv": {"window_size": 32, "kernel_size": 5},
    "infinipot_v": {"share": 0.5, "recent": 0.25},
    "infinipot_v_released": {"share": 0.5, "recent": 0.25},
    "streammem": {},
    "hermes": {},
    "hermes_released": {},
    "attention_only": {"query_stride": 1},
    "similarity_only": {"redundancy": "hidden", "neighbours": "sequence", "sketch_dim": 128, "seed": 0},
    "novelty": {"lambda": 0.0, **NOVELTY},
    "learned": {"attention_term": False, "age_term": False, **NOVELTY},
    **{key: {"head_hidden_size": 0, "seed": 0} for key in ("dms", "trim_kv", "kvzap")},
}
PER_HEAD = {"h2o", "snapkv", "infinipot_v", "infinipot_v_released"}
REINDEXED = {"streaming_llm", "hermes", "hermes_released"}
REACHES = {"streammem": ["memory"], "hermes": ["causal", "causal"], "hermes_released": ["all", "all"]}

# Of the drive: text before the media, chunks of all sorts, text that nothing is observed of.
STEPS = ["prefix", "both", "text inside", "text", "picture", "sound", "both", "text inside"]
ENDS_BEFORE = 5
"""The last stream of a batch has ended by this step."""

BUDGETS = [(2, 1), (7, 3), (20, 2), (90, 60)]
"""Far below, about and above what a few chunks bring."""

TEN_BUDGETS = [(6, 2), (5, 3), (90, 60), (1, 1), (12, 1), (6, 2), (8, 5), (5, 2), (1, 1), (14, 60)]
"""Of the ten layers of a hierarchy: one is shallow, the last three are deep."""

GROUPS, DIM = 2, 8
AXES = (0, 0, 1, 2)
"""Which rotary id (time, height, width) turns which pair of coordinates, as in `text_model`."""

FREQUENCIES = [10_000 ** (-2 * pair / DIM) for pair in range(DIM // 2)]


@dataclass
class Held:
    """One stored token of one row: a sample, or one of its key-value heads."""

    index: int
    kind: int
    ids: tuple[float, ...]
    time: float
    key: Tensor
    """Complex ``[heads, D/2]``, without rotation."""
    value: Tensor
    """``[heads, D]``."""
    hidden: list[float]
    mass: float = 0.0
    repeats: float = -1.0
    """Largest cosine with an earlier token of its modality, when it arrived."""
    new: bool = True
    asked: list[float] = field(default_factory=list)

    @property
    def origin(self) -> int:
        return self.index if self.index >= 0 else -1 - self.index


def rotated(pairs: Tensor, ids: list[tuple[float, ...]]) -> Tensor:
    """Real states ``[heads, N, D]`` of complex ones turned to N rotary ids."""
    angles = [[each[axis] * f for axis, f in zip(AXES, FREQUENCIES, strict=True)] for each in ids]
    turned = pairs * torch.exp(1j * torch.tensor(angles, dtype=torch.float64).view(-1, DIM // 2))
    return torch.cat((turned.real, turned.imag), -1)


def keys_of(row: list[Held]) -> Tensor:
    """Keys ``[heads, N, D]`` of a row as they are attended to."""
    return rotated(torch.stack([p.key for p in row], dim=1), [p.ids for p in row])


def attention(queries: Tensor, keys: Tensor, reach: str = "causal") -> Tensor:
    """Weights ``[H, Q, K]`` of the queries ``[H, Q, D]``, which are the last Q of the keys ``[G, K, D]``."""
    per_group = len(queries) // len(keys)
    past, count = keys.shape[1] - queries.shape[1], queries.shape[1]
    rows = []
    for head, of_head in enumerate(queries):
        for q in range(count):
            sees = {"causal": past + q + 1, "all": past + count, "memory": past}[reach]
            logits = keys[head // per_group, :sees] @ of_head[q] / math.sqrt(DIM)
            rows.append(torch.cat((logits.softmax(0), torch.zeros(past + count - sees, dtype=torch.float64))))
    return torch.stack(rows).view(len(queries), count, -1)


class Simulated:
    """The streams of a batch in every layer, held and compressed by the book."""

    def __init__(self, budgets, method, options, batch, heads=None):
        self.budgets, self.method, self.heads = budgets, method, heads
        self.options = {**DEFAULTS[method], **options}
        self.rows = GROUPS if method in PER_HEAD else 1
        self.compact = options.get("position_ids", "compact" if method in REINDEXED else "original") == "compact"
        self.memory = [[[[] for _ in range(self.rows)] for _ in range(batch)] for _ in budgets]
        self.start, self.next, self.shift = [None] * batch, [None] * batch, [None] * batch

    # ---- rotary ids --------------------------------------------------------------------------------------

    def assign_position_ids(self, sample, facts, following, text):
        """Ids of a chunk and of the text after it, moved to where the memory ends."""
        if not self.compact:
            return [ids for _, ids, _ in facts], following
        first = min([ids[0] for _, ids, _ in facts] + [following])
        if self.start[sample] is None and not text:
            self.start[sample] = first
        if self.next[sample] is None:
            return [ids for _, ids, _ in facts], following
        if self.shift[sample] is None:
            self.shift[sample] = self.next[sample] - first
        shift = self.shift[sample]
        moved = [(t + shift, h, w) if kind == VISUAL else (t + shift,) * 3 for kind, (t, h, w), _ in facts]
        return moved, following + shift

    def renumber(self, sample):
        """Consecutive time ids for the media of every row, which all end right before the next chunk."""
        rows = [row for layer in self.memory for row in layer[sample]]
        start = self.start[sample]
        times = [sorted({p.ids[0] for p in row if p.ids[0] >= start}) for row in rows]
        tops = [max(p.ids[1:]) for row in rows for p in row if p.kind == VISUAL]
        self.next[sample] = max([start + len(ids) for ids in times] + [top + 1 for top in tops])
        self.shift[sample] = None
        for row, ids in zip(rows, times, strict=True):
            for p in row:
                if p.ids[0] >= start:
                    time = self.next[sample] - len(ids) + ids.index(p.ids[0])
                    p.ids = (time, *p.ids[1:]) if p.kind == VISUAL else (time,) * 3

    # ---- a step ------------------------------------------------------------------------------------------

    def step(self, layer, sample, new, queries, observe):
        """Append tokens, and note the attention scores that everything receives from the queries ``[H, Q, D]``."""
        rows = self.memory[layer][sample]
        if self.method in ("novelty", "learned"):
            for k, p in enumerate(new):
                p.repeats = self.repeats(layer, [*rows[0], *new[: k + 1]])
        for head, row in enumerate(rows):
            mine = slice(head, head + 1) if self.rows > 1 else slice(None)
            row.extend(replace(p, key=p.key[mine], value=p.value[mine]) for p in new)
        if not (observe and new):
            return
        if self.method not in ("h2o", "snapkv", "attention_only", "novelty", "learned"):
            return
        weights = attention(queries, torch.cat([keys_of(row) for row in rows]))
        for head, row in enumerate(rows):
            mine = weights.unflatten(0, (self.rows, -1))[head].mean(0)
            if self.method == "snapkv":
                mine = mine[-self.options["window_size"] :]
            # The last query, and every so many-th before it.
            asked = mine.flip(0)[:: self.options.get("query_stride", 1)]
            mass = asked.sum(0) * len(mine) / len(asked)
            for p, received in zip(row, mass.tolist(), strict=True):
                p.mass = received if self.method == "snapkv" else p.mass + received

    def ask(self, layer, sample, number, queries, keys):
        """Note the mean attention of a probe's rotated queries ``[H, P, D]`` with keys ``[G, P, D]`` of its own."""
        (row,) = self.memory[layer][sample]
        weights = attention(queries, torch.cat((keys_of(row), keys), dim=1), REACHES[self.method][number])
        for p, received in zip(row, weights.mean((0, 1)).tolist()[: len(row)], strict=True):
            p.asked = [*p.asked[:number], received]

    # ---- compression -------------------------------------------------------------------------------------

    def compress(self, sample):
        for number in range(self.rows):
            rows = [layer[sample][number] for layer in self.memory]
            scores = [getattr(self, self.method)(layer, row) for layer, row in enumerate(rows)]
            if self.method.startswith("hermes"):
                self.smooth(rows, scores)
            for layer, (row, score) in enumerate(zip(rows, scores, strict=True)):
                kept = self.merge(layer, row, score)
                self.memory[layer][sample][number] = [replace(p, new=False, asked=[]) for p in kept]
        if self.compact:
            self.renumber(sample)

    def merge(self, layer, row, score):
        """What stays of a row, and after it what is made of others."""
        budget: dict[int, int] = dict(zip((VISUAL, AUDIO), self.budgets[layer], strict=True))
        over_budget = [kind for kind in budget if sum(p.kind == kind for p in row) > budget[kind]]
        made = []
        if self.method == "streammem" and VISUAL in over_budget:
            fresh = [(p, s) for p, s in zip(row, score, strict=True) if p.new and p.kind == VISUAL]
            for time in sorted({p.time for p, _ in fresh})[-budget[VISUAL] :]:
                frame = [(p, s) for p, s in fresh if p.time == time]
                ids = [round(sum(p.ids[axis] for p, _ in frame) / len(frame)) for axis in range(3)]
                made.append(mean_of([p for p, _ in frame], [s for _, s in frame], tuple(ids)))
            budget[VISUAL] -= len(made)
        elif self.method.startswith("hermes") and layer >= 0.7 * len(self.budgets):
            for kind in over_budget:
                budget[kind] -= 1
        kept = [row[k] for k in best_of(score, row, budget[VISUAL], budget[AUDIO])]
        if self.method.startswith("hermes") and layer >= 0.7 * len(self.budgets):
            behind = max(p.ids[0] for p in row) + 1
            for kind in over_budget:
                dropped = [p for p in row if p.kind == kind and not any(p is other for other in kept)]
                place = [round(sum(p.ids[axis] for p in dropped) / len(dropped)) for axis in (1, 2)]
                ids = (behind, *place) if kind == VISUAL else (behind,) * 3
                made.append(mean_of(dropped, [1.0] * len(dropped), ids))
        return kept + made

    # ---- scores ------------------------------------------------------------------------------------------

    def streaming_llm(self, layer, row):
        return [math.inf if p.origin < self.options["num_sink_tokens"] else p.index for p in row]

    def h2o(self, layer, row):
        scores = [p.mass for p in row]
        for kind, budget in zip((VISUAL, AUDIO), self.budgets[layer], strict=True):
            places = [k for k, p in enumerate(row) if p.kind == kind]
            for k in places[len(places) - min(len(places), math.ceil(budget / 2)) :]:
                scores[k] = math.inf
        return scores

    def snapkv(self, layer, row):
        before = max(len(row) - self.options["window_size"], 0)
        scores = [math.inf] * len(row)
        for k in range(before):
            reach = self.options["kernel_size"] // 2
            around = [row[j].mass for j in range(k - reach, k + reach + 1) if 0 <= j < before]
            scores[k] = sum(around) / self.options["kernel_size"]
        return scores

    def infinipot_v(self, layer, row):
        keys = keys_of(row)[0].tolist()
        scores = [math.sqrt(sum(x * x for x in p.value[0].tolist())) for p in row]
        for kind, budget in zip((VISUAL, AUDIO), self.budgets[layer], strict=True):
            places = [k for k, p in enumerate(row) if p.kind == kind]
            frame, patch = self.grid([row[k] for k in places], kind)
            frames = sorted(set(frame))
            latest = frames[len(frames) - max(int(len(frames) * self.options["recent"]), 1) :] if frames else []
            novelty = {}
            for i, k in enumerate(places):
                peers = [j for n, j in enumerate(places) if frame[n] in latest and patch[n] == patch[i]]
                mean = sum(cosine(keys[k], keys[j]) for j in peers) / len(peers) if peers else 0.0
                novelty[k] = math.inf if frame[i] in latest else -mean
            places.sort(key=lambda k: (-novelty[k], -k))
            for k in places[: int(budget * self.options["share"])]:
                scores[k] = math.inf
        return scores

    infinipot_v_released = infinipot_v

    def grid(self, row, kind):
        """Frame and patch of every token of one modality."""
        if self.method == "infinipot_v":
            return [p.time for p in row], [p.ids[1:] if kind == VISUAL else None for p in row]
        size = sum(p.time == max(other.time for other in row) for p in row)
        from_end = [len(row) - 1 - k for k in range(len(row))]
        return [-(k // size) for k in from_end], [-(k % size) for k in from_end]

    def streammem(self, layer, row):
        return [p.asked[0] for p in row]

    def hermes(self, layer, row):
        media = [p for p in row if p.kind != TEXT]
        last, layers = len(media) - 1, len(self.budgets)
        begin, end = int(0.1 * layers), int(0.7 * layers)
        depth = (layer - begin) / (end - begin)
        omega, decay, question = 0.75 - 0.6 * depth, 20 - 12 * depth, 1
        if layer < begin:
            omega, decay = 1, 20
        elif layer >= end:
            omega, decay, question = 0, 0, 0
        recency = scaled([math.exp(-decay * (last - i) / max(last, 1)) for i in range(len(media))])
        looked_at = scaled([p.asked[question] for p in media])
        mixed = iter([(1 - omega) * a + omega * r for a, r in zip(looked_at, recency, strict=True)])
        return [0.0 if p.kind == TEXT else next(mixed) for p in row]

    hermes_released = hermes

    def smooth(self, rows, scores):
        """From the deepest layer up."""
        layers = len(rows)
        for layer in reversed(range(layers - 1)):
            weight = 0.1 if layer < int(0.1 * layers) else 0.4 if layer >= int(0.7 * layers) else 0.3
            below = self.deeper(rows[layer], scores[layer], rows[layer + 1], scores[layer + 1])
            scores[layer] = [(1 - weight) * a + weight * b for a, b in zip(scores[layer], below, strict=True)]

    def deeper(self, row, score, row_below, score_below):
        """Score in the next layer of the same token, or of what stands at the same part of the media there."""
        if self.method == "hermes":
            known = dict(zip([p.index for p in row_below], score_below, strict=True))
            return [known.get(p.index, own) for p, own in zip(row, score, strict=True)]
        line = [s for p, s in zip(row_below, score_below, strict=True) if p.kind != TEXT]
        count = sum(p.kind != TEXT for p in row)
        result = list(score)
        for slot, k in enumerate(k for k, p in enumerate(row) if p.kind != TEXT):
            at = min(max((slot + 0.5) * len(line) / count - 0.5, 0.0), len(line) - 1)
            left = int(at)
            right = min(left + 1, len(line) - 1)
            result[k] = line[left] * (1 - (at - left)) + line[right] * (at - left)
        return result

    def attention_only(self, layer, row):
        return [p.mass for p in row]

    def similarity_only(self, layer, row):
        source = self.options["redundancy"]
        if source == "key":
            vectors = keys_of(row).transpose(0, 1).flatten(1).tolist()
        elif source == "value":
            vectors = [p.value.flatten().tolist() for p in row]
        else:
            vectors = [p.hidden for p in row]
        if source == "sketch":
            hidden = torch.tensor([vectors], dtype=torch.float64)
            vectors = sketch(hidden, self.options["sketch_dim"], layer, self.options["seed"])[0].tolist()
        return [1 - redundancy_of(k, row, vectors, self.options["neighbours"]) for k in range(len(row))]

    def repeats(self, layer, row):
        """Largest cosine of the sketch of a row's last token with that of an earlier one of its modality."""
        bits, size, seed = (self.options[key] for key in ("sketch_bits", "sketch_dim", "seed"))
        hidden = torch.tensor([[p.hidden for p in row]], dtype=torch.float64)
        *earlier, last = sketch(hidden, size, layer, seed, bits)[0].tolist()
        return max(
            (cosine(last, v) for v, p in zip(earlier, row, strict=False) if p.kind == row[-1].kind), default=-1.0
        )

    def log_novelty(self, layer, row):
        """Measured when each token arrived, or again over what is there now."""
        if self.options["novelty"] == "arrival":
            found = [p.repeats for p in row]
        else:
            found = [self.repeats(layer, row[: k + 1]) for k in range(len(row))]
        return [math.log(1 - n + 1e-2) for n in found]

    def novelty(self, layer, row):
        weight = self.options["lambda"]
        return [
            n + (weight * math.log(p.mass + 1e-12) if weight else 0.0)
            for n, p in zip(self.log_novelty(layer, row), row, strict=True)
        ]

    def head_value(self, layer, p):
        """What the head of a layer says about a token."""
        head = self.heads[layer]
        mean = sum(p.hidden) / len(p.hidden)
        spread = math.sqrt(sum((x - mean) ** 2 for x in p.hidden) / len(p.hidden) + 1e-5)
        inputs = [(x - mean) / spread for x in p.hidden]
        if head.inner is not None:
            rows = zip(head.inner.weight.tolist(), head.inner.bias.tolist(), strict=True)
            sums = [sum(w * x for w, x in zip(row, inputs, strict=True)) + b for row, b in rows]
            inputs = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in sums]
        z = sum(w * x for w, x in zip(head.outer.weight[0].tolist(), inputs, strict=True)) * 64 / len(inputs)
        return z if head.bias is None else z + head.bias.item()

    def dms(self, layer, row):
        return [self.head_value(layer, p) for p in row]

    kvzap = dms

    def trim_kv(self, layer, row):
        last = max(p.origin for p in row)
        return [-(last - p.origin) * math.log(1 + math.exp(-self.head_value(layer, p))) for p in row]

    def learned(self, layer, row):
        head, last = self.heads[layer], max(p.origin for p in row)
        scores = []
        for n, p in zip(self.log_novelty(layer, row), row, strict=True):
            score = self.head_value(layer, p) + head.novelty.item() * n
            if self.options["attention_term"]:
                score += head.terms["attention"].item() * math.log(p.mass + 1e-12)
            if self.options["age_term"]:
                score += head.terms["age"].item() * math.log(1 + last - p.origin)
            scores.append(score)
        return scores


def scaled(values):
    """To [0, 1]; all 0 where they are the same."""
    least, most = min(values, default=0.0), max(values, default=0.0)
    return [(x - least) / (most - least) if most > least else 0.0 for x in values]


def mean_of(members: list[Held], weights: list[float], ids: tuple[float, ...]) -> Held:
    """One token made of several: keys without rotation and values weighted, times and beginning not."""
    total = sum(weights)
    return Held(
        index=-1 - min(p.origin for p in members),
        kind=members[0].kind,
        ids=ids,
        time=sum(p.time for p in members) / len(members),
        key=sum((p.key * (w / total) for p, w in zip(members, weights, strict=True)), torch.zeros(())),
        value=sum((p.value * (w / total) for p, w in zip(members, weights, strict=True)), torch.zeros(())),
        hidden=[],
    )


# ---- the drive -----------------------------------------------------------------------------------------------------


class Source:
    """Facts of one stream as an encoder counts them: ids go on for ever; frames are grids with patches missing."""

    def __init__(self, rng):
        self.rng, self.next, self.clock, self.origin = rng, 0, 0.0, None

    def read(self, what):
        """(modality, rotary ids, seconds) of the tokens of one step."""
        facts = []
        if what in ("prefix", "text"):
            facts = [(TEXT, (self.next + i,) * 3, math.nan) for i in range(self.rng.randint(3, 6))]
            self.next += len(facts)
            return facts
        self.origin = self.next if self.origin is None else self.origin
        for second in range(self.rng.randint(1, 3)):
            if what == "text inside" and second == 1:
                facts += [(TEXT, (self.next + i,) * 3, math.nan) for i in range(2)]
                self.next += 2
            begin = self.next
            if what != "sound":
                patches = [(h, w) for h in range(2) for w in range(3) if self.rng.random() < 0.7] or [(1, 2)]
                facts += [(VISUAL, (begin, self.origin + h, self.origin + w), self.clock) for h, w in patches]
            if what != "picture":
                heard = range(self.rng.randint(1, 3))
                facts += [(AUDIO, (begin + i,) * 3, self.clock + i / 4) for i in heard]
            self.clock += 1
            self.next = max(max(ids) for _, ids, _ in facts) + self.rng.randint(1, 3)
        return facts


ROTARY = Rotary(text_model(1).rotary_emb)


def drive(method, options, *, seed, batch, budgets, per_group):
    """Run random chunks through the cache and the simulation; yields both after each compression."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    heads = GROUPS * per_group
    cache = CompressedCache(profile(*budgets), new_method(method, layers=len(budgets), channels=6, **options))
    cache.bind(ROTARY)
    simulated = Simulated(budgets, method, options, batch, getattr(cache.method, "heads", None))
    sources, counters = [Source(rng) for _ in range(batch)], [0] * batch

    def random_states(count, width):
        parts = torch.randn(2, batch, count, width, DIM // 2, dtype=torch.float64, generator=generator)
        return torch.complex(*parts) * 1.3

    def turned(states, ids):
        return torch.stack([rotated(of_sample, of_ids) for of_sample, of_ids in zip(states, ids, strict=True)])

    for number, what in enumerate(STEPS):
        observe = what not in ("prefix", "text")
        facts = [
            [] if batch > 1 and sample == batch - 1 and number >= ENDS_BEFORE else source.read(what)
            for sample, source in enumerate(sources)
        ]
        width = max(map(len, facts))
        padded = [row + [(TEXT, (0, 0, 0), math.nan)] * (width - len(row)) for row in facts]
        ids, modality, time = (torch.tensor([[one[i] for one in row] for row in padded]) for i in (1, 0, 2))
        valid = torch.tensor([[k < len(row) for k in range(width)] for row in facts])
        following = torch.tensor([source.next for source in sources])
        positions, following = cache.assign_position_ids(
            ids.permute(2, 0, 1), modality, valid, following, text=not observe
        )
        placed = []
        for sample, row in enumerate(facts):
            expected, then = simulated.assign_position_ids(sample, row, sources[sample].next, not observe)
            assert positions[:, sample, : len(row)].T.tolist() == [list(one) for one in expected]
            assert following[sample] == then
            placed.append(expected + [(0, 0, 0)] * (width - len(row)))
        cache.begin(positions, modality if observe else None, time, valid, following)
        for layer, memory in enumerate(cache.layers):
            query, key = turned(random_states(heads, width), placed), random_states(GROUPS, width)
            value = torch.randn(batch, GROUPS, width, DIM, dtype=torch.float64, generator=generator)
            hidden = torch.randn(batch, width, 6, dtype=torch.float64, generator=generator)
            memory.observe_hidden(hidden)
            attended = memory.update(turned(key, placed), value)
            compressed_attention(torch.nn.Identity(), query, *attended, None, cache_layer=memory)
            for sample, row in enumerate(facts):
                new = [
                    Held(
                        counters[sample] + k,
                        row[k][0],
                        placed[sample][k],
                        row[k][2],
                        key[sample, :, k],
                        value[sample, :, k],
                        hidden[sample, k].tolist(),
                    )
                    for k in range(len(row))
                ]
                simulated.step(layer, sample, new, query[sample, :, : len(row)], observe)
        counters = [seen + len(row) for seen, row in zip(counters, facts, strict=True)]
        if not observe:
            continue
        for which, probe in enumerate(cache.method.probes):
            length = 2 + which
            asked = [[(int(start) + i,) * 3 for i in range(length)] for start in following]
            with cache.probing(probe, torch.zeros(batch, length, 1)):
                cache.begin(torch.tensor(asked).permute(2, 0, 1))
                for layer, memory in enumerate(cache.layers):
                    query, key = (turned(random_states(n, length), asked) for n in (heads, GROUPS))
                    attended = memory.update(key, torch.zeros_like(key))
                    compressed_attention(torch.nn.Identity(), query, *attended, None, cache_layer=memory)
                    for sample in range(batch):
                        simulated.ask(layer, sample, which, query[sample], key[sample])
        cache.compress()
        for sample in range(batch):
            simulated.compress(sample)
        yield cache, simulated


def assert_same(cache: CompressedCache, simulated: Simulated) -> int:
    """Every row of every layer holds the same tokens, with the same facts, keys, values and attention scores."""
    rows = 0
    for layer, (memory, expected) in enumerate(zip(cache.layers, simulated.memory, strict=True)):
        table = cache.token_metadata(layer)
        keys, values = memory.rotated_keys(), memory.values
        # Nothing is masked in a single stream.
        assert table.valid.all() or len(expected) > 1
        for row, stored in enumerate(row for sample in expected for row in sample):
            real = table.valid[row]
            assert table.index[row][real].tolist() == [p.index for p in stored]
            assert table.modality[row][real].tolist() == [p.kind for p in stored]
            assert table.position_ids[row][real].tolist() == [list(p.ids) for p in stored]
            times = torch.tensor([p.time for p in stored])
            torch.testing.assert_close(table.time[row][real], times, rtol=0, atol=1e-5, equal_nan=True)
            # The decoder's angles are float32 numbers.
            torch.testing.assert_close(keys[row][:, real], keys_of(stored), rtol=0, atol=2e-5)
            value = torch.stack([p.value for p in stored], dim=1)
            torch.testing.assert_close(values[row][:, real], value, rtol=1e-5, atol=1e-5)
            if memory.attention_scores is not None:
                mass = torch.tensor([p.mass for p in stored], dtype=torch.float64)
                torch.testing.assert_close(memory.attention_scores[row][real], mass, rtol=1e-4, atol=1e-5)
            rows += 1
    return rows


def budgets_of(method: str) -> list[tuple[int, int]]:
    return TEN_BUDGETS if method.startswith("hermes") else BUDGETS


def name(value) -> str:
    return value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()) or "-"


@pytest.mark.parametrize(("method", "options"), METHODS, ids=name)
@pytest.mark.parametrize("batch", [2, pytest.param(1, marks=pytest.mark.long)])
def test_retained_sets_and_merged_tokens_equal_the_description(method, options, batch):
    """Also with 1, 2 and 4 query heads a key-value head."""
    budgets = budgets_of(method)
    compared = 0
    for seed, per_group in enumerate((1, 2, 4)):
        with torch.no_grad():
            for cache, simulated in drive(
                method, options, seed=seed, batch=batch, budgets=budgets, per_group=per_group
            ):
                compared += assert_same(cache, simulated)
    rows = GROUPS if method in PER_HEAD else 1
    assert compared == 3 * 6 * batch * rows * len(budgets)


@pytest.mark.parametrize("method", DEFAULTS)
@pytest.mark.parametrize("batch", [1, 2])
def test_budgets_next_to_what_is_there(method, batch):
    """One less than, as many as and one more than the first three chunks bring, in either modality."""
    with torch.no_grad():
        everything = drive("attention_only", {}, seed=5, batch=batch, budgets=[(999, 999)], per_group=1)
        _, simulated = list(itertools.islice(everything, 3))[-1]
        (row,) = simulated.memory[0][0]
        visual, audio = (sum(p.kind == kind for p in row) for kind in (VISUAL, AUDIO))
        budgets = [(visual - 1, audio), (visual, audio), (visual + 1, audio - 1), (visual, audio + 1)]
        if method.startswith("hermes"):
            budgets = [budgets[layer % 4] for layer in range(10)]
        for cache, simulated in drive(method, {}, seed=5, batch=batch, budgets=budgets, per_group=2):
            assert_same(cache, simulated)


# ---- every method, in a whole decoder ------------------------------------------------------------------------------

EVERY = [(name, {}) for name in SELECTION_METHODS] + [
    ("attention_only", {"query_stride": 4}),
    ("omnimem", {"variant": "release"}),
    ("snapkv", {"window_size": 5, "kernel_size": 3}),
    ("h2o", {"position_ids": "compact"}),
    ("streammem", {"position_ids": "compact"}),
]
SHORT = [(7, 4), (3, 6), (9, 2)]
LONG = [(5, 5), (8, 3), (11, 6), (0, 7), (6, 0), (9, 4)]


@pytest.fixture(scope="module")
def decoder():
    model = text_model(layers=10)
    attach(model)
    return model


def counted(cache, layer: int) -> list[tuple[int, ...]]:
    """Text, visual and audio tokens in every row of a layer."""
    table = cache.token_metadata(layer)
    rows = zip(table.modality, table.valid, strict=True)
    return [tuple(int((kinds[real] == kind).sum()) for kind in (TEXT, VISUAL, AUDIO)) for kinds, real in rows]


@pytest.mark.parametrize(("method", "options"), EVERY, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_exactly_the_budget_is_retained_in_every_row(method, options, dtype):
    model = text_model(layers=10, dtype=dtype)
    attach(model)
    cache = CompressedCache(profile(*TEN_BUDGETS), new_method(method, layers=10, **options))
    streams = [stream_parts(LONG, prefix=3, dtype=dtype), stream_parts(SHORT, prefix=5, seed=1, dtype=dtype)]
    with torch.no_grad():
        stream(model, cache, batch_parts(*streams))
    came = [[sum(sizes[kind] for sizes in chunks) for kind in (0, 1)] for chunks in (LONG, SHORT)]
    for layer, budget in enumerate(TEN_BUDGETS):
        rows = counted(cache, layer)
        per_sample = len(rows) // 2
        assert per_sample == (2 if method in PER_HEAD else 1)
        limits = (999, 999) if method == "full" else budget
        for row, found in enumerate(rows):
            sample = row // per_sample
            assert found == ((3, 5)[sample], *map(min, limits, came[sample])), (layer, row)
            assert cache.token_counts()[layer]["visual"][sample] == found[1]
        assert cache.layers[layer].keys.dtype == dtype and cache.layers[layer].keys.isfinite().all()


@pytest.mark.parametrize(("method", "options"), EVERY, ids=name)
def test_a_stream_keeps_the_same_alone_again_and_beside_a_longer_one(decoder, method, options):
    short, long = stream_parts(SHORT, prefix=5, seed=1), stream_parts(LONG, prefix=3)
    runs = []
    for parts in (short, short, batch_parts(short, long), batch_parts(long, short)):
        cache = CompressedCache(profile(*TEN_BUDGETS), new_method(method, layers=10, **options))
        with torch.no_grad():
            stream(decoder, cache, parts)
        runs.append(cache)
    assert same(held(runs[0]), held(runs[1]))
    for cache, sample in ((runs[2], 0), (runs[3], 1)):
        assert cache.next_position_id[sample] == runs[0].next_position_id[0]
        for layer, (alone, beside) in enumerate(zip(runs[0].layers, cache.layers, strict=True)):
            count = len(alone.metadata.index)
            rows = slice(sample * count, (sample + 1) * count)
            expected, table = runs[0].token_metadata(layer), cache.token_metadata(layer)
            real = table.valid[rows]
            assert expected.valid.all()
            for fact in ("index", "position_ids", "modality"):
                assert torch.equal(getattr(table, fact)[rows][real], getattr(expected, fact).flatten(0, 1))
            for ours, theirs in ((beside.keys, alone.keys), (beside.values, alone.values)):
                close = ours[rows].transpose(1, 2)[real]
                torch.testing.assert_close(close, theirs.transpose(1, 2).flatten(0, 1), rtol=0, atol=1e-9)


# ---- probes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", REACHES)
def test_only_released_hermes_shows_every_layer_the_embeddings_of_a_question(method):
    model = text_model(layers=4)
    attach(model)
    shown: list[list[Tensor]] = []
    decoder_layers: Any = model.layers
    for layer in decoder_layers:
        into: list[Tensor] = []
        shown.append(into)
        layer.input_layernorm.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0].clone()))
    cache = CompressedCache(profile(*[(4, 2)] * 4), build_selection(method))
    parts = stream_parts([(7, 4)])
    with torch.no_grad():
        stream(model, cache, parts)
    count = len(cache.method.probes)
    # The prefix, the chunk, then the questions.
    assert {len(into) for into in shown} == {2 + count}
    for number in range(count):
        embeds = probe_embeds(number, 1)
        asked = [torch.equal(into[2 + number], embeds) for into in shown]
        assert asked == [True, *[method == "hermes_released"] * 3]
        assert cache.method.probes[number].propagates == (method != "hermes_released")


@pytest.mark.parametrize("method", ["streammem", "hermes", "hermes_released"])
def test_the_stream_asks_the_probes_texts_where_the_media_end(tiny64, method, monkeypatch):
    """As a question's tokens where the probe ends the user's turn, as bare text otherwise; and then forgets them."""
    layers = len(tiny64.language_model.layers)
    cache = CompressedCache(profile(*[(3, 2)] * layers), build_selection(method))
    live = Stream(tiny64, cache)
    asked = []
    genuine = cache.probing

    def noted(probe, embeds):
        asked.append((probe, embeds, cache.lengths()))
        return genuine(probe, embeds)

    monkeypatch.setattr(cache, "probing", noted)
    width = tiny64.language_model.config.hidden_size
    parts = [replace(p, embeds=p.embeds.repeat(1, 1, -(-width // WIDTH))[..., :width]) for p in stream_parts([(7, 4)])]
    with torch.no_grad():
        live.forward(parts[0], text=True)
        live.step(parts[1])
    texts = {"streammem": ["<|im_end|>\n<|im_start|>assistant\n"]}.get(method, [GLOBAL, f"{LOCAL} {GLOBAL}"])
    assert len(asked) == len(texts)
    for text, (probe, embeds, lengths) in zip(texts, asked, strict=True):
        assert torch.equal(embeds, tiny64.embed(tiny64.tokenizer(text, return_tensors="pt").input_ids))
        assert probe.softmax_over == REACHES[method][0]
        # The prefix and the whole chunk, no other probe.
        assert lengths == [3 + 11] * layers
    assert cache.lengths() == [3 + 3 + 2] * layers


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), METHODS, ids=name)
def test_recorded_settings_rebuild_the_same_method(method, options):
    built = build_selection(method, **options)
    again = build_selection(method, **json.loads(json.dumps(built.recorded())))
    assert type(again) is type(built)
    assert again.recorded() == built.recorded() and options.items() <= built.recorded().items()
    for fact in (
        "attention_scores",
        "probes",
        "position_ids",
        "per_head",
        "reads_keys",
        "reads_values",
        "stores_features",
    ):
        assert getattr(again, fact) == getattr(built, fact)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("streaming_llm", {"num_sink_tokens": -1}),
        ("snapkv", {"window_size": 0}),
        ("snapkv", {"kernel_size": 0}),
        ("snapkv", {"kernel_size": 4}),
        ("infinipot_v", {"share": 1.5}),
        ("infinipot_v", {"share": math.nan}),
        ("infinipot_v_released", {"recent": -0.1}),
        ("attention_only", {"query_stride": 0}),
        ("similarity_only", {"redundancy": "hiden"}),
        ("similarity_only", {"neighbours": "modal"}),
        ("h2o", {"position_ids": "reindex"}),
        ("kvzap", {"head_hidden_size": -1}),
    ],
    ids=name,
)
def test_a_bad_option_is_one_line_that_names_it(method, options):
    with pytest.raises(OmniMemError) as error:
        build_selection(method, **options)
    ((option, value),) = options.items()
    assert option in str(error.value)
    assert str(value) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", sorted(DEFAULTS.keys() - {"novelty"}))
def test_an_option_of_another_method_is_refused(method):
    with pytest.raises(OmniMemError, match="has no option 'lambda'"):
        build_selection(method, lambda_=0.1)

"""HERMES (arXiv 2601.14724): recency in shallow layers, attention of fixed questions in deep layers.

Shallow layers retain recent tokens, deep layers those that a fixed "global" question attends to, and layers between
them a mixture that depends on depth. Scores are smoothed from deep to shallow layers, and deep layers retain the mean
of the evicted tokens. `hermes` runs the questions through the model and smooths token by token. `hermes_released` does
what the authors' code does: every layer is given the questions' token embeddings, whose attention is not causal, and
scores of two layers are matched by column in the cache. Position ids are compacted (their "eager" mode).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimem.modality import EVICTABLE, VISUAL
from omnimem.selection.base import Candidates, MergedTokens, Probe, SelectionMethod, compute_dtype
from omnimem.selection.merge import merge_tokens
from omnimem.selection.topk import keep_mask

LOCAL = "Describe what is happening right now: the objects, the small actions, where things are, what is heard."
GLOBAL = "Summarise the whole story so far: who appears, what happens in which order, what it is about."
"""The two fixed questions, in our words."""

SHALLOW, DEEP = 0.1, 0.7
"""Relative depths at which the middle layers begin and end."""

SMOOTHING = {"shallow": 0.1, "middle": 0.3, "deep": 0.4}
"""Weight of the next deeper layer's score."""

EPSILON = 1e-6


class Hermes(SelectionMethod):
    """Recency in shallow layers, what a fixed question attends to in deep ones, a mixture between.

    S = (1 − ω)·A + ω·R with attention A of a question and recency R = e^(−kδ), each scaled to [0, 1].

    δ is the relative age of a media token: 1 for the oldest stored one, 0 for the newest. Shallow layers have
    ω = 1, k = 20; deep ones ω = 0; between, at depth p of the band, ω = 0.75 − 0.6 p and k = 20 − 12 p.
    """

    probes = (Probe(GLOBAL), Probe(f"{LOCAL} {GLOBAL}"))
    position_ids = "compact"

    def score(self, candidates: Candidates) -> Tensor:
        """S of one layer by itself, before smoothing; 0 for text."""
        omega, decay, attention = self._band(candidates)
        table = candidates.metadata
        media = (table.modality > 0) & table.valid
        count = media.sum(1, keepdim=True)
        age = (count - media.cumsum(1)) / (count - 1).clamp_min(1)
        score = (1 - omega) * _minmax(attention, media) if omega < 1 else torch.zeros_like(attention)
        return (score + omega * _minmax(torch.exp(-decay * age), media)) * media

    def _band(self, candidates: Candidates) -> tuple[float, float, Tensor]:
        """ω, k and the attention of a layer."""
        globally, mixed = (probe.to(compute_dtype(probe)) for probe in candidates.probe_scores)
        band = band_of(candidates.layer, candidates.num_layers)
        if band == "shallow":
            return 1.0, 20.0, mixed
        if band == "deep":
            return 0.0, 0.0, globally
        first, last = int(candidates.num_layers * SHALLOW), int(candidates.num_layers * DEEP)
        depth = (candidates.layer - first) / (last - first)
        return 0.75 - 0.6 * depth, 20.0 - 12.0 * depth, mixed

    def scores(self, layers: Iterable[Candidates]) -> Iterator[tuple[Candidates, Tensor]]:
        """S̃(l) = (1 − λ)·S(l) + λ·S̃(l + 1), from the deepest layer up."""
        held = list(layers)
        smoothed = [self.score(candidates) for candidates in held]
        for number in range(len(held) - 2, -1, -1):
            weight = SMOOTHING[band_of(number, len(held))]
            deeper = self.align(held[number], smoothed[number], held[number + 1], smoothed[number + 1])
            smoothed[number] = (1 - weight) * smoothed[number] + weight * deeper
        return zip(held, smoothed, strict=True)

    def align(self, here: Candidates, score: Tensor, below: Candidates, deeper: Tensor) -> Tensor:
        """The deeper layer's score of the same tokens; the layer's own score where the deeper one has evicted them."""
        wanted, known = _stream_indices(here), _stream_indices(below)
        ordered, order = known.sort(dim=1)
        place = torch.searchsorted(ordered, wanted).clamp_max(ordered.shape[1] - 1)
        return torch.where(ordered.gather(1, place) == wanted, deeper.gather(1, order.gather(1, place)), score)

    def select(self, candidates: Candidates, score: Tensor) -> tuple[Tensor, MergedTokens | None]:
        """Top scores; in deep layers one token of each modality is the mean of the evicted ones."""
        table, budget = candidates.metadata, candidates.budget
        if band_of(candidates.layer, candidates.num_layers) != "deep":
            return keep_mask(score, table, budget), None
        counts = {name: ((table.modality == kind) & table.valid).sum(1) for name, kind in EVICTABLE.items()}
        reserved = {name: (count > getattr(budget, name)).long() for name, count in counts.items()}
        keep = keep_mask(score, table, budget, reserved)
        into = torch.full_like(table.index, -1)
        for slot, kind in enumerate(EVICTABLE.values()):
            into[(table.modality == kind) & table.valid & ~keep] = slot
        merged = merge_tokens(table, into, torch.ones_like(score), len(EVICTABLE))
        # The merged token has the time id after all retained ones.
        time = table.position_ids[..., 0].masked_fill(~table.valid, 0).amax(1)[:, None] + 1
        position = time[..., None].expand(-1, len(EVICTABLE), 3).clone()
        seen = (merged.metadata.modality == VISUAL)[..., None]
        position[..., 1:] = torch.where(seen, merged.metadata.position_ids[..., 1:], position[..., 1:])
        return keep, merged._replace(metadata=replace(merged.metadata, position_ids=position))


class HermesReleased(Hermes):
    """As the authors' code: questions do not run through the model, scores of layers are matched by column."""

    probes = tuple(replace(probe, softmax_over="all", propagates=False) for probe in Hermes.probes)

    def align(self, here: Candidates, score: Tensor, below: Candidates, deeper: Tensor) -> Tensor:
        """The deeper layer's scores in stored order, stretched linearly to this layer's length."""
        result = score.clone()
        for row in range(len(score)):
            mine, other = (((c.metadata.modality > 0) & c.metadata.valid)[row] for c in (here, below))
            if mine.any() and other.any():
                line = deeper[row][other][None, None]
                result[row, mine] = F.interpolate(line, size=int(mine.sum()), mode="linear")[0, 0]
        return result


def band_of(layer: int, layers: int) -> str:
    """``shallow``, ``middle`` or ``deep``."""
    if layer < int(layers * SHALLOW):
        return "shallow"
    return "deep" if layer >= int(layers * DEEP) else "middle"


def _minmax(values: Tensor, member: Tensor) -> Tensor:
    """Members of each row ``[R, N]`` scaled to [0, 1]."""
    least = values.masked_fill(~member, torch.inf).amin(1, keepdim=True)
    most = values.masked_fill(~member, -torch.inf).amax(1, keepdim=True)
    return ((values - least) / (most - least + EPSILON)).nan_to_num(0)


def _stream_indices(candidates: Candidates) -> Tensor:
    """Stream index of every token ``[R, N]``; padding gets unique numbers."""
    table = candidates.metadata
    own = torch.iinfo(torch.int64).max - candidates.layer % 2 * 2**40 - torch.arange(table.index.shape[1])
    return torch.where(table.valid, table.index, own.to(table.index.device))

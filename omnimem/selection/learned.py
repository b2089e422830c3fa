"""Learned retention: a small head per layer says what a token is worth when it arrives [ours].

    x_k = z_k + β_l · log(1 − n_k + ε) [+ w_l · log a_k + u_l · log age_k]        z_k = head_l(LayerNorm(H_k))

n_k is the novelty of `omnimem.selection.novelty`, a_k the attention score of ψ (arXiv 2606.07577), age_k the number of
tokens since k arrived. The head starts at 0 and β_l at 1, so that untrained heads retain what `novelty` retains. Heads
are trained through `selection.gradient`, alone (the base frozen) or together with LoRA.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimem.errors import OmniMemError
from omnimem.selection.base import Arrival, AttentionScoreSpec, Candidates
from omnimem.selection.novelty import Measured, Novelty, NoveltySettings, log_attention

REFERENCE_WIDTH = 64
"""Input width at which the output of a head is not rescaled; with it one learning rate serves all models."""

TERMS = ("attention", "age")
"""Optional terms of the score; their weights start at 0."""


class SelectionHead(nn.Module):
    """The learned part of the score in one layer.

    It has no bias: tokens compete within a layer, so a constant would change nothing.

    Parameters
    ----------
    channels : int
        C, width of the hidden states.
    hidden : int
        Width of one hidden layer; 0: a linear head.
    terms : tuple of str
        Optional terms (`TERMS`).
    """

    def __init__(self, channels: int, hidden: int = 0, terms: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.inner = nn.Linear(channels, hidden) if hidden else None
        self.outer = nn.Linear(hidden or channels, 1, bias=False)
        nn.init.zeros_(self.outer.weight)
        self.novelty = nn.Parameter(torch.ones(1))
        self.names = terms
        self.terms = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in terms})

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return z ``[B, T]`` of hidden states ``[B, T, C]``, the weight β of novelty, and those of the terms."""
        normal = F.layer_norm(states.to(self.outer.weight.dtype), states.shape[-1:])
        if self.inner is not None:
            normal = F.gelu(self.inner(normal))
        # Adam changes every weight by about the learning rate, so without the factor z would change in proportion to C.
        z = self.outer(normal)[..., 0] * (REFERENCE_WIDTH / normal.shape[-1])
        return z, self.novelty * 1, [self.terms[name] * 1 for name in self.names]


class Learned(Novelty):
    """A trained head per layer plus weighted novelty.

    Parameters
    ----------
    head_hidden_size : int
        Width of one hidden layer of the head; 0: linear.
    attention_term, age_term : bool
        Whether the log attention score and the log age are terms of the score, with learned weights.
    novelty, sketch_dim, sketch_bits, query_stride, seed
        See `NoveltySettings`.

    Attributes
    ----------
    heads : list of SelectionHead or None
        One per layer, see `new_heads` and `omnimem.selection.heads`.
    """

    differentiable = True

    def __init__(
        self,
        head_hidden_size: int = 0,
        attention_term: bool = False,
        age_term: bool = False,
        novelty: Measured = "arrival",
        sketch_dim: int = 32,
        sketch_bits: int = 8,
        query_stride: int = 4,
        seed: int = 0,
    ) -> None:
        self.options = NoveltySettings(novelty, sketch_dim, sketch_bits, query_stride, seed)
        self.options.check("learned")
        if head_hidden_size < 0:
            raise OmniMemError(f"selection learned: head_hidden_size must be at least 0, got {head_hidden_size!r}")
        self.head_hidden_size = head_hidden_size
        self.terms = tuple(name for name, wanted in zip(TERMS, (attention_term, age_term), strict=True) if wanted)
        self.attention_scores = AttentionScoreSpec("heads", query_stride) if attention_term else None
        self.heads: list[SelectionHead] | None = None

    def new_heads(self, num_layers: int, channels: int, dtype: torch.dtype = torch.float32) -> list[SelectionHead]:
        """Make untrained heads for a decoder of `num_layers` layers of width `channels`, and use them."""
        with torch.random.fork_rng([]):
            torch.manual_seed(self.options.seed)
            self.heads = [
                SelectionHead(channels, self.head_hidden_size, self.terms).to(dtype) for _ in range(num_layers)
            ]
        return self.heads

    @property
    def num_columns(self) -> int:
        """Numbers stored before the sketch: the score at arrival and the weights of what is added to it later.

        A token carries these weights (the same for all), so that compressions need no parameters: those may be sharded
        over processes, which do not all compress at the same time.
        """
        return 1 + (self.options.novelty == "every_chunk") + len(self.terms)

    def score(self, candidates: Candidates) -> Tensor:
        """The score x."""
        assert candidates.features is not None
        columns = iter(candidates.features[..., : self.num_columns].unbind(-1))
        score = next(columns)
        if self.options.novelty == "every_chunk":
            score = score + next(columns) * self.present_log_novelty(candidates)
        for name, weight in zip(self.terms, columns, strict=True):
            score = score + weight * {"attention": log_attention, "age": _log_age}[name](candidates)
        return score

    def features(self, arrival: Arrival) -> Tensor:
        """Columns (`num_columns`), then the sketch: ``[B, T, num_columns + sketch_dim]``."""
        log_novelty, sketches = self.measure(arrival)
        z, novelty, terms = self._head(arrival.layer)(arrival.hidden)
        columns = [z + novelty * log_novelty] if self.options.novelty == "arrival" else [z, novelty.expand_as(z)]
        columns += [weight.expand_as(z) for weight in terms]
        dtype = torch.promote_types(z.dtype, sketches.dtype)
        return torch.cat((torch.stack(columns, -1).to(dtype), sketches.to(dtype)), -1)

    def settings(self) -> dict[str, Any]:
        """Form of the head, optional terms, settings of the novelty term."""
        terms = {f"{name}_term": name in self.terms for name in TERMS}
        return {"head_hidden_size": self.head_hidden_size, **terms, **asdict(self.options)}

    def _head(self, layer: int) -> SelectionHead:
        if self.heads is None:
            raise OmniMemError(
                "selection.method=learned has no trained heads: train with recipe=selection_only, give the folder of "
                "such a run, or use selection.method=novelty, which needs no training"
            )
        return self.heads[layer]


def _log_age(candidates: Candidates) -> Tensor:
    """Log of 1 + the number of tokens since each candidate arrived ``[R, N]``; merged tokens count from their first."""
    assert candidates.features is not None
    index = candidates.metadata.index
    index = torch.where(index < 0, -1 - index, index)
    newest = index.masked_fill(~candidates.metadata.valid, 0).amax(1, keepdim=True)
    return torch.log1p((newest - index).clamp_min(0).to(candidates.features.dtype))

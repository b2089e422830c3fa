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
from torch import Tensor, nn

from omnimem.selection.base import Arrival, AttentionScoreSpec, Candidates, log_attention
from omnimem.selection.heads import HeadMethod, TokenHead, ages
from omnimem.selection.novelty import Measured, Novelty, NoveltySettings

TERMS = ("attention", "age")
"""Optional terms of the score; their weights start at 0."""


class SelectionHead(TokenHead):
    """The learned part of the score in one layer.

    It has no bias: tokens compete within a layer, so a constant would change nothing.

    Parameters
    ----------
    channels, hidden
        See `TokenHead`.
    terms : tuple of str
        Optional terms (`TERMS`).
    """

    def __init__(self, channels: int, hidden: int = 0, terms: tuple[str, ...] = ()) -> None:
        super().__init__(channels, hidden, bias=False)
        self.novelty = nn.Parameter(torch.ones(1))
        self.names = terms
        self.terms = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in terms})

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return z ``[B, T]`` of hidden states ``[B, T, C]``, the weight β of novelty, and those of the terms."""
        return self.value(states), self.novelty * 1, [self.terms[name] * 1 for name in self.names]


class Learned(HeadMethod[SelectionHead], Novelty):
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
        One per layer, see `HeadMethod`.
    """

    differentiable = True
    without_heads = (
        "selection.method=learned has no trained heads: train with recipe=selection_only, give the folder of such a "
        "run, or use selection.method=novelty, which needs no training"
    )

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
        self.set_form("learned", head_hidden_size, seed)
        self.terms = tuple(name for name, wanted in zip(TERMS, (attention_term, age_term), strict=True) if wanted)
        self.attention_scores = AttentionScoreSpec("heads", query_stride) if attention_term else None

    def new_head(self, channels: int) -> SelectionHead:
        """Head of one layer, see `SelectionHead`."""
        return SelectionHead(channels, self.head_hidden_size, self.terms)

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
        z, novelty, terms = self.head(arrival.layer)(arrival.hidden)
        columns = [z + novelty * log_novelty] if self.options.novelty == "arrival" else [z, novelty.expand_as(z)]
        columns += [weight.expand_as(z) for weight in terms]
        dtype = torch.promote_types(z.dtype, sketches.dtype)
        return torch.cat((torch.stack(columns, -1).to(dtype), sketches.to(dtype)), -1)

    def settings(self) -> dict[str, Any]:
        """Form of the head, optional terms, settings of the novelty term."""
        terms = {f"{name}_term": name in self.terms for name in TERMS}
        return {"head_hidden_size": self.head_hidden_size, **terms, **asdict(self.options)}


def _log_age(candidates: Candidates) -> Tensor:
    """Log of 1 + the age of each candidate ``[R, N]``."""
    return torch.log1p(ages(candidates))

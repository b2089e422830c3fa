"""StreamMem (arXiv 2508.15717): what the start of an answer looks at, and one prototype a frame.

The proxy query is the chat template's turn switch (``<|im_end|>`` and the assistant's opening). Where the paper does
not say: attention is averaged over heads and proxy tokens, keys are averaged without their rotation, a prototype
stands at its frame's time id and the mean of its height and width ids. Its filter of near-equal input frames and its
YaRN factor are no part of selection; all methods are fed the same frames.
"""

from __future__ import annotations

from torch import Tensor

from omnimem.modality import VISUAL
from omnimem.selection.base import Candidates, MergedTokens, Probe, SelectionMethod
from omnimem.selection.merge import means
from omnimem.selection.topk import dense_rank, keep_mask


class StreamMem(SelectionMethod):
    """What the start of an answer attends to, and one attention-weighted mean token a frame.

    Prototypes count towards the visual budget (if there are more frames than places, the newest have one) and compete
    like any other position from the next chunk on.
    """

    probes = (Probe("", turn=True, attends="memory"),)

    def score(self, candidates: Candidates) -> Tensor:
        """Mean attention of the proxy query."""
        return candidates.probes[0]

    def choose(self, candidates: Candidates, score: Tensor) -> tuple[Tensor, MergedTokens | None]:
        """Top scores, and the prototypes of the new frames where something has to go."""
        table, budget = candidates.metadata, candidates.budget
        visual = (table.modality == VISUAL) & table.valid
        over_budget = visual.sum(1) > budget.visual
        new = visual & over_budget[:, None]
        new[:, : candidates.old] = False
        frame, frames = dense_rank(table.time.double(), new)
        count = frames.clamp_max(budget.visual)
        slot = frame - (frames - count)[:, None]
        slots = int(count.max())
        if slots == 0:
            return keep_mask(score, table, budget), None
        into = slot.masked_fill(~new | (slot < 0), -1)
        merged = means(table, into, score, slots)
        return keep_mask(score, table, budget, {"visual": count}), merged

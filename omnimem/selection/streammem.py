"""StreamMem (arXiv 2508.15717): the tokens that the start of an answer attends to, and one prototype per frame.

The proxy query is the chat template's turn switch (``<|im_end|>`` and the assistant's opening). Where the paper does
not say: attention is averaged over heads and proxy tokens, keys are averaged without their rotation, and a prototype
has the time id of its frame and the mean of its height and width ids. The paper's filter of similar input frames and
its YaRN factor are not part of the selection; all methods get the same frames.
"""

from __future__ import annotations

from torch import Tensor

from omnimem.modality import VISUAL
from omnimem.selection.base import Candidates, MergedTokens, Probe, SelectionMethod
from omnimem.selection.merge import merge_tokens
from omnimem.selection.topk import dense_rank, keep_mask


class StreamMem(SelectionMethod):
    """What the start of an answer attends to, and one attention-weighted mean token per frame.

    Prototypes count towards the visual budget (if there are more frames than budget, the newest frames have one) and
    compete like any other token from the next chunk on.
    """

    probes = (Probe("", as_user_turn=True, softmax_over="memory"),)

    def score(self, candidates: Candidates) -> Tensor:
        """Mean attention of the proxy query."""
        return candidates.probe_scores[0]

    def select(self, candidates: Candidates, score: Tensor) -> tuple[Tensor, MergedTokens | None]:
        """Top scores, and prototypes of the new frames where the visual tokens exceed the budget."""
        table, budget = candidates.metadata, candidates.budget
        visual = (table.modality == VISUAL) & table.valid
        over_budget = visual.sum(1) > budget.visual
        new = visual & over_budget[:, None]
        new[:, : candidates.num_previous] = False
        frame, frames = dense_rank(table.time.double(), new)
        count = frames.clamp_max(budget.visual)
        slot = frame - (frames - count)[:, None]
        slots = int(count.max())
        if slots == 0:
            return keep_mask(score, table, budget), None
        into = slot.masked_fill(~new | (slot < 0), -1)
        merged = merge_tokens(table, into, score, slots)
        return keep_mask(score, table, budget, {"visual": count}), merged

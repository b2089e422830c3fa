"""Retain tokens evenly spaced over everything seen: a baseline that uses no content.

Sampling the stored tokens evenly at every chunk is not even over the stream: older tokens are thinned out again at
every chunk, and after 40 chunks four fifths of the cache come from the last one. Here a token's priority never
changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omnimem.modality import EVICTABLE
from omnimem.selection.base import Candidates, SelectionMethod

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""2^64 over the golden ratio, as int64: the fractional parts of its multiples are spread evenly."""


class Uniform(SelectionMethod):
    """Tokens evenly spaced over everything seen, to a factor of two.

    The level of a token is the size w of the largest aligned block of w = 1, 2, 4, … stream indices (all modalities
    counted) in which it is the first of its modality. The highest levels are retained; ties are ordered by the
    golden-ratio (low-discrepancy) sequence.

    With a budget of B, and s stream indices between the first and the latest token of a modality, there is a w below
    2·s/(B − 1) so that the first token of every block of w is retained, and of the others only first tokens of blocks
    of w/2. Therefore

    - every token seen is less than w after a retained one: at most twice the distance of B evenly spaced tokens;
    - where a modality fills the stream, gaps between retained tokens are between w/2 and w (except the first gap,
    because
      the stream may begin inside a block).

    The retained set depends on the stream alone, not on how it is split into chunks.
    """

    def score(self, candidates: Candidates) -> Tensor:
        """Base-2 logarithm of the level, plus a fraction that orders ties; float64."""
        table = candidates.metadata
        score = torch.zeros(table.index.shape, dtype=torch.float64, device=table.index.device)
        for kind in EVICTABLE.values():
            competing = (table.modality == kind) & table.valid
            score = torch.where(competing, _priority(table.index, competing), score)
        return score


def _priority(index: Tensor, member: Tensor) -> Tensor:
    """Priority of each member among all members ever seen; `index` ``[R, N]`` increases over the members of a row.

    A token shares all blocks of at least 2^level indices with the member before it, where level is the bit length of
    the exclusive or of the two indices. Comparing with the previous *retained* member gives the same level as
    comparing with the previous member *seen*, because any evicted member between them has a lower level.
    """
    latest = index.masked_fill(~member, -1).cummax(1).values
    before = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)
    level = torch.frexp((index ^ before).double()).exponent.long()
    fraction = ((index >> level) * GOLDEN >> 24) & (2**40 - 1)
    return (level + fraction.double() / 2**40).masked_fill(before < 0, torch.inf)

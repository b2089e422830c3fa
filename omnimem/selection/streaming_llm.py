"""StreamingLLM (arXiv 2309.17453): a few sink tokens at the beginning of the stream, and the most recent tokens.

Position ids are compacted (`position_ids="compact"`), as in the paper: keys are stored without rotation and rotated to
their position in the cache in every forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnimem.errors import OmniMemError
from omnimem.selection.base import Candidates, SelectionMethod


class StreamingLLM(SelectionMethod):
    """The first tokens of the whole stream (sinks, often text) and the most recent ones of each modality.

    Parameters
    ----------
    num_sink_tokens : int
        Tokens at the beginning of the stream that are always retained; text among them is retained anyway.
    """

    position_ids = "compact"

    def __init__(self, num_sink_tokens: int = 4) -> None:
        if num_sink_tokens < 0:
            raise OmniMemError(f"selection streaming_llm: num_sink_tokens must be at least 0, got {num_sink_tokens}")
        self.num_sink_tokens = num_sink_tokens

    def score(self, candidates: Candidates) -> Tensor:
        """Index in the stream; infinite for sinks."""
        index = candidates.metadata.index
        return index.double().masked_fill(index < self.num_sink_tokens, torch.inf)

    def settings(self) -> dict[str, Any]:
        """The number of sinks."""
        return {"num_sink_tokens": self.num_sink_tokens}

"""Retain tokens that differ from their neighbours: the 1 − s of ψ = a^λ · (1 − s) (arXiv 2606.07577, ablations)."""

from __future__ import annotations

from typing import Any, Literal

from omnimem.selection.omnimem import OmniMem


class SimilarityOnly(OmniMem):
    """Dissimilarity to neighbouring tokens alone, the 1 − s of ψ = a^λ · (1 − s), used for the paper's fine-tuning.

    Parameters
    ----------
    redundancy, neighbours, sketch_dim, seed
        As in `OmniMemSettings`.
    """

    def __init__(
        self,
        redundancy: Literal["hidden", "sketch", "value", "key"] = "hidden",
        neighbours: Literal["sequence", "modality"] = "sequence",
        sketch_dim: int = 128,
        seed: int = 0,
    ) -> None:
        self._settings = {"redundancy": redundancy, "neighbours": neighbours, "sketch_dim": sketch_dim, "seed": seed}
        super().__init__(lambda_=0.0, **self._settings)

    def settings(self) -> dict[str, Any]:
        """What the similarity is computed from."""
        return self._settings

"""AVBA: how many visual and audio positions each layer keeps, from what a calibration set showed (method.md §3).

    C_m  = H[ā_m] / log K_m · (1 − s̄_m)                 compressibility of a modality: high is hard to compress
    w_v  = r·C_v / (r·C_v + C_a),  w_a = 1 − w_v          split inside a layer
    B(l) = softmax_l(C(l) / T) · L · mean budget          share of a layer, C(l) over both modalities together

Pure arithmetic on a handful of numbers a layer; what is measured comes from `omnimem.calibrate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from omnimem.budget.profile import BudgetProfile, LayerBudget
from omnimem.errors import OmniMemError

DEFAULT_FLOOR = 16
"""Fewest positions a modality keeps in any layer."""


@dataclass(frozen=True)
class Compressibility:
    """What calibration measured of one group of positions of a layer (visual, audio, or both together).

    Attributes
    ----------
    entropy : float
        Entropy of the attention mass over the group, divided by log K: 0 (one position has it all) to 1 (even).
    redundancy : float
        Mean s̄ of the group: 1 where positions repeat their neighbours.
    count : float
        Mean number K of positions.
    """

    entropy: float
    redundancy: float
    count: float

    @property
    def value(self) -> float:
        """C = normalised entropy · (1 − redundancy); 0 for a group that never occurred."""
        return self.entropy * max(0.0, 1 - self.redundancy)


@dataclass(frozen=True)
class LayerStatistics:
    """Compressibility of a layer's visual positions, audio positions, and all of them."""

    visual: Compressibility
    audio: Compressibility
    both: Compressibility


def allocate(
    layers: Sequence[LayerStatistics],
    mean_budget: int,
    ratio: float = 5.0,
    temperature: float = 0.2,
    floor: int = DEFAULT_FLOOR,
) -> tuple[LayerBudget, ...]:
    """Distribute ``L · mean_budget`` positions over layers and modalities.

    Parameters
    ----------
    layers : sequence of LayerStatistics
        One a layer.
    mean_budget : int
        Positions a layer keeps on average, both modalities together.
    ratio : float
        Weight r of the visual modality.
    temperature : float
        T of the softmax over layers; high makes layers equal.
    floor : int
        Fewest positions of a modality in a layer.

    Returns
    -------
    tuple of LayerBudget
        Whole numbers that sum to ``L · mean_budget`` exactly, none below `floor`.

    Raises
    ------
    OmniMemError
        Parameters out of range, or a mean budget that cannot hold the floors.
    """
    if not 0 < ratio < math.inf or not 0 < temperature < math.inf or floor < 1:
        raise OmniMemError(
            f"ratio and temperature must be above 0 and the floor at least 1, got {ratio}, {temperature}, {floor}"
        )
    hardest = max(layer.both.value for layer in layers)
    shares = [math.exp((layer.both.value - hardest) / temperature) for layer in layers]
    wanted = []
    for layer, share in zip(layers, shares, strict=True):
        visual, audio = ratio * layer.visual.value, layer.audio.value
        # A layer in which neither modality can be compressed at all is split by the ratio alone.
        split = visual / (visual + audio) if visual + audio > 0 else ratio / (1 + ratio)
        wanted += [share * split, share * (1 - split)]
    return _whole_budgets(wanted, mean_budget, floor)


def _whole_budgets(wanted: Sequence[float], mean_budget: int, floor: int) -> tuple[LayerBudget, ...]:
    """Budgets in proportion to `wanted` (visual and audio of each layer, by turns) at a mean budget."""
    if mean_budget < 2 * floor:
        raise OmniMemError(f"a mean budget of {mean_budget} cannot hold {floor} visual and {floor} audio positions")
    whole = round_to_sum(wanted, len(wanted) // 2 * mean_budget, floor)
    return tuple(LayerBudget(visual, audio) for visual, audio in zip(whole[::2], whole[1::2], strict=True))


def round_to_sum(weights: Sequence[float], total: int, floor: int) -> list[int]:
    """Whole numbers proportional to `weights`, none below `floor`, that sum to `total` (largest remainder)."""
    at_floor: set[int] = set()
    while True:
        free = [i for i in range(len(weights)) if i not in at_floor]
        left = total - floor * len(at_floor)
        scale = left / math.fsum(weights[i] for i in free)
        below = {i for i in free if weights[i] * scale < floor}
        if not below:
            break
        at_floor |= below
    exact = {i: weights[i] * scale for i in free}
    result = [floor if i in at_floor else math.floor(exact[i]) for i in range(len(weights))]
    # Largest remainder first; equal remainders go to the earlier entry, so results do not depend on the machine.
    for i in sorted(free, key=lambda i: (math.floor(exact[i]) - exact[i], i))[: total - sum(result)]:
        result[i] += 1
    return result


def rescale(layers: Sequence[LayerBudget], mean_budget: int, floor: int = DEFAULT_FLOOR) -> tuple[LayerBudget, ...]:
    """The same distribution at another mean budget; sums and floors as in `allocate`."""
    return _whole_budgets([float(n) for layer in layers for n in (layer.visual, layer.audio)], mean_budget, floor)


def with_mean(profile: BudgetProfile, mean_budget: int) -> BudgetProfile:
    """A profile at another mean budget: allocated anew from its statistics, or its budgets in proportion.

    Budgets in proportion have the default floor, unless some of the profile's own are already below it.
    """
    statistics = profile.statistics
    if statistics.get("method") != "avba":
        smallest = min(min(layer.visual, layer.audio) for layer in profile.layers)
        floor = DEFAULT_FLOOR if smallest >= DEFAULT_FLOOR else 1
        return replace(profile, layers=rescale(profile.layers, mean_budget, floor))
    layers = [LayerStatistics(**{k: Compressibility(**v) for k, v in layer.items()}) for layer in statistics["layers"]]
    budgets = allocate(layers, mean_budget, statistics["ratio"], statistics["temperature"], statistics["floor"])
    return replace(profile, layers=budgets)

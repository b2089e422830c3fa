"""AVBA: how many visual and audio positions each layer keeps, from what a calibration set showed (method.md §3).

    C_m  = H[ā_m] / log K_m · (1 − s̄_m)                 compressibility of a modality: high is hard to compress
    w_v  = r·C_v / (r·C_v + C_a),  w_a = 1 − w_v          split inside a layer
    B(l) = softmax_l(C(l) / T) · L · mean budget          share of a layer, C(l) over both modalities together

Arithmetic on a few numbers per layer, measured by `omnimem.calibrate`. From the weights on it is exact (`Fraction`):
budgets sum to what they must, and a share that equals the floor is not taken to be below it by a rounding error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from omnimem.budget.profile import BudgetProfile, LayerBudget
from omnimem.budget.statistics import METHOD, Calibration, LayerStatistics
from omnimem.errors import OmniMemError

DEFAULT_FLOOR = 16
"""Fewest positions a modality keeps in any layer."""


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
        Parameters out of range, or a mean budget below two floors.
    """
    if not 0 < ratio < math.inf or not 0 < temperature < math.inf or floor < 1:
        raise OmniMemError(
            f"ratio and temperature must be above 0 and the floor at least 1, got {ratio}, {temperature}, {floor}"
        )
    hardest = max(layer.both.value for layer in layers)
    wanted = []
    for layer in layers:
        share = Fraction(math.exp((layer.both.value - hardest) / temperature))
        visual, audio = Fraction(ratio) * Fraction(layer.visual.value), Fraction(layer.audio.value)
        # A layer whose positions all repeat each other has no compressibility to compare: the ratio alone splits it.
        split = visual / (visual + audio) if visual + audio > 0 else Fraction(ratio) / (1 + Fraction(ratio))
        wanted += [share * split, share * (1 - split)]
    return _whole_budgets(wanted, mean_budget, floor)


def _whole_budgets(wanted: Sequence[Fraction | int], mean_budget: int, floor: int) -> tuple[LayerBudget, ...]:
    """Budgets in proportion to `wanted` (visual and audio of each layer in turn) at a mean budget."""
    if mean_budget < 2 * floor:
        raise OmniMemError(f"a mean budget of {mean_budget} cannot hold {floor} visual and {floor} audio positions")
    whole = round_to_sum(wanted, len(wanted) // 2 * mean_budget, floor)
    return tuple(LayerBudget(visual, audio) for visual, audio in zip(whole[::2], whole[1::2], strict=True))


def round_to_sum(weights: Sequence[Fraction | int], total: int, floor: int) -> list[int]:
    """Round in proportion to `weights`, by largest remainder, to whole numbers of a given sum and floor.

    Parameters
    ----------
    weights : sequence of Fraction or int
        At least 0, one of them above 0.
    total : int
        Sum of the result, at least ``len(weights) * floor``.
    floor : int
        Smallest entry of the result, at least 1.
    """
    at_floor: set[int] = set()
    while True:
        # The shares of the free entries average to at least the floor, and are exact: one of them always stays free.
        free = [i for i in range(len(weights)) if i not in at_floor]
        scale = Fraction(total - floor * len(at_floor)) / sum(weights[i] for i in free)
        below = {i for i in free if weights[i] * scale < floor}
        if not below:
            break
        at_floor |= below
    share = {i: weights[i] * scale for i in free}
    result = [floor if i in at_floor else math.floor(share[i]) for i in range(len(weights))]
    # Largest remainder first; equal remainders go to the earlier entry.
    for i in sorted(free, key=lambda i: (result[i] - share[i], i))[: total - sum(result)]:
        result[i] += 1
    return result


def rescale(layers: Sequence[LayerBudget], mean_budget: int, floor: int = DEFAULT_FLOOR) -> tuple[LayerBudget, ...]:
    """The same distribution at another mean budget; sums and floors as in `allocate`."""
    return _whole_budgets([n for layer in layers for n in (layer.visual, layer.audio)], mean_budget, floor)


def with_mean(profile: BudgetProfile, mean_budget: int) -> BudgetProfile:
    """A profile at another mean budget: allocated anew from its statistics, or its budgets in proportion.

    Budgets in proportion have the default floor, unless some of the profile's own are already below it.
    """
    if profile.statistics.get("method") != METHOD:
        smallest = min(min(layer.visual, layer.audio) for layer in profile.layers)
        floor = DEFAULT_FLOOR if smallest >= DEFAULT_FLOOR else 1
        return replace(profile, layers=rescale(profile.layers, mean_budget, floor))
    found = Calibration.from_dict(profile.statistics, len(profile.layers))
    return replace(profile, layers=allocate(found.layers, mean_budget, found.ratio, found.temperature, found.floor))

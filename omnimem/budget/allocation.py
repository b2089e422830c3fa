"""Audio-visual budget allocation (AVBA, arXiv 2606.07577): budgets of layers from calibration statistics.

    C_m  = H[ā_m] / log K_m · (1 − s̄_m)                 compressibility of a modality: high is hard to compress
    w_v  = r·C_v / (r·C_v + C_a),  w_a = 1 − w_v          split inside a layer
    B(l) = softmax_l(C(l) / T) · L · mean budget          share of a layer, C(l) over both modalities together

H[ā_m] is the entropy of the mean attention scores of modality m, K_m its number of tokens, s̄_m its mean redundancy, r
the ratio, T the temperature and L the number of layers. The statistics come from `omnimem.calibrate`. After the
exponential, arithmetic is exact (`Fraction`): budgets sum to the total, and no rounding error puts a share that equals
the floor below it.
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
"""Smallest budget of a modality in any layer, in tokens."""


def allocate(
    layers: Sequence[LayerStatistics],
    mean_budget: int,
    ratio: float = 5.0,
    temperature: float = 0.2,
    floor: int = DEFAULT_FLOOR,
) -> tuple[LayerBudget, ...]:
    """Distribute ``L · mean_budget`` tokens over layers and modalities.

    Parameters
    ----------
    layers : sequence of LayerStatistics
        One for each layer.
    mean_budget : int
        Mean number of tokens per layer, both modalities together.
    ratio : float
        Weight r of the visual modality.
    temperature : float
        T of the softmax over layers; higher is more uniform.
    floor : int
        Smallest budget of a modality in a layer.

    Returns
    -------
    tuple of LayerBudget
        Whole numbers that sum to ``L · mean_budget`` exactly, none below `floor`.

    Raises
    ------
    OmniMemError
        Parameters out of range, or a mean budget below ``2 * floor``.
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
        # If all tokens of a layer repeat each other, both C are 0 and the ratio alone decides the split.
        split = visual / (visual + audio) if visual + audio > 0 else Fraction(ratio) / (1 + Fraction(ratio))
        wanted += [share * split, share * (1 - split)]
    return _whole_budgets(wanted, mean_budget, floor)


def _whole_budgets(wanted: Sequence[Fraction | int], mean_budget: int, floor: int) -> tuple[LayerBudget, ...]:
    """Budgets in proportion to `wanted` (visual and audio of each layer in turn) at a mean budget."""
    if mean_budget < 2 * floor:
        raise OmniMemError(
            f"a mean budget of {mean_budget} is below the minimum of {floor} tokens per modality; raise the budget or "
            "lower the floor"
        )
    whole = round_to_sum(wanted, len(wanted) // 2 * mean_budget, floor)
    return tuple(LayerBudget(visual, audio) for visual, audio in zip(whole[::2], whole[1::2], strict=True))


def round_to_sum(weights: Sequence[Fraction | int], total: int, floor: int) -> list[int]:
    """Whole numbers in proportion to `weights` with a given sum and minimum (largest-remainder method).

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
        # The mean share of the free entries is at least the floor, so at least one of them stays free.
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
    """Budgets in the same proportions at another mean budget; sum and floor as in `allocate`."""
    return _whole_budgets([n for layer in layers for n in (layer.visual, layer.audio)], mean_budget, floor)


def with_mean(profile: BudgetProfile, mean_budget: int) -> BudgetProfile:
    """A profile at another mean budget: allocated again from its statistics if it has them, else scaled.

    Scaled budgets have the default floor, unless a budget of the profile is already below it.
    """
    if profile.statistics.get("method") != METHOD:
        return replace(profile, layers=rescale(profile.layers, mean_budget, least_mean(profile) // 2))
    found = Calibration.from_dict(profile.statistics, len(profile.layers))
    return replace(profile, layers=allocate(found.layers, mean_budget, found.ratio, found.temperature, found.floor))


def least_mean(profile: BudgetProfile) -> int:
    """Smallest mean budget that `with_mean` accepts: its floor for both modalities."""
    if profile.statistics.get("method") == METHOD:
        return 2 * Calibration.from_dict(profile.statistics, len(profile.layers)).floor
    smallest = min(min(layer.visual, layer.audio) for layer in profile.layers)
    return 2 * (DEFAULT_FLOOR if smallest >= DEFAULT_FLOOR else 1)

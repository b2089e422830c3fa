"""Budgets that change during training: a curriculum from a large budget to the target, or a random one per step.

    accelerate launch train.py recipe=quickstart memory.start_budget=32768           # lowered to memory.mean_budget
    accelerate launch train.py recipe=quickstart memory.random_budget=[4096,49152]   # one adapter for this range

The curriculum is a function of the step and the number of steps; the random budget is a function of the seed and the
step. Resumed runs and all processes therefore use the same budgets.
"""

from __future__ import annotations

import math
import random

from omnimem.budget import BudgetProfile
from omnimem.budget.allocation import with_mean
from omnimem.recipe import Recipe


def profile_at(recipe: Recipe, profile: BudgetProfile, step: int, steps: int) -> BudgetProfile:
    """Budgets of step `step` (0-based) of `steps`, in the proportions of the run's profile.

    The curriculum lowers ``start_budget`` geometrically to the profile's mean within `memory.curriculum_ratio` of the
    steps. A ``random_budget`` is drawn from a log-uniform distribution.

    Raises
    ------
    OmniMemError
        A mean budget is below the profile's minimum per modality.
    """
    memory = recipe.memory
    if memory.random_budget is not None:
        low, high = memory.random_budget
        drawn = random.Random(f"{recipe.train.seed} {step}").uniform(math.log(low), math.log(high))
        return with_mean(profile, round(math.exp(drawn)))
    if memory.start_budget is None:
        return profile
    progress = step / max(1.0, memory.curriculum_ratio * steps)
    if progress >= 1:
        return profile
    target = profile.mean_budget
    return with_mean(profile, round(memory.start_budget * (target / memory.start_budget) ** progress))

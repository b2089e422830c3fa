"""Budgets that change while a model is trained: a curriculum from large to target, or another one every step.

    train.py recipe=… memory.start_budget=32768                 # falls to memory.mean_budget
    train.py recipe=… memory.random_budget=[4096,49152]         # one adapter for all of them

Both depend on nothing but the step, so a run that is resumed, and every process of it, sees the same.
"""

from __future__ import annotations

import math
import random

from omnimem.budget import BudgetProfile
from omnimem.budget.allocation import with_mean
from omnimem.recipe import Recipe


def profile_at(recipe: Recipe, profile: BudgetProfile, step: int, steps: int) -> BudgetProfile:
    """Budgets of a step (0-based) out of so many, in the proportions of the run's profile.

    ``start_budget`` falls geometrically and reaches the profile's own mean after `memory.curriculum_ratio` of the
    steps;
    a ``random_budget`` is drawn evenly on a logarithmic scale.

    Raises
    ------
    OmniMemError
        A mean budget cannot hold the profile's floors.
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

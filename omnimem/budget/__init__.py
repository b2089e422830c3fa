"""How many positions each layer keeps: budget profiles."""

from omnimem.budget.profile import PROFILE_FILE, BudgetProfile, LayerBudget, ModelFingerprint

__all__ = ["PROFILE_FILE", "BudgetProfile", "LayerBudget", "ModelFingerprint"]

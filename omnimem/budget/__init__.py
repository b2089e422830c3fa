"""How many positions each layer keeps: budget profiles."""

from omnimem.budget.profile import BudgetProfile, LayerBudget, ModelFingerprint

__all__ = ["BudgetProfile", "LayerBudget", "ModelFingerprint"]

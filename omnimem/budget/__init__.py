"""Budget profiles: how many visual and audio tokens each layer retains."""

from omnimem.budget.profile import PROFILE_FILE, BudgetProfile, LayerBudget, ModelFingerprint

__all__ = ["PROFILE_FILE", "BudgetProfile", "LayerBudget", "ModelFingerprint"]

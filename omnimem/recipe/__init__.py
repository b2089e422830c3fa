"""Recipes: typed configuration of a training run, with one source of defaults.

    recipe = load_recipe(["recipe=quickstart", "train.max_steps=3", "lora.target_modules=[q_proj,v_proj]"])

`schema` declares every key with its default, `parser` reads recipe files and ``key=value`` arguments, `checks` refuses
values that do not fit, `reference` writes the table of all keys in recipes/README.md. Nothing here imports torch, so a
typing mistake is reported at once and not after a model has loaded.
"""

from omnimem.recipe.checks import keys_without_effect, validate
from omnimem.recipe.parser import list_recipes, load_recipe, recipe_summary
from omnimem.recipe.schema import DataConfig, DistillConfig, FinishConfig, Recipe, TrainConfig, to_dict, to_yaml

__all__ = [
    "DataConfig",
    "DistillConfig",
    "FinishConfig",
    "Recipe",
    "TrainConfig",
    "keys_without_effect",
    "list_recipes",
    "load_recipe",
    "recipe_summary",
    "to_dict",
    "to_yaml",
    "validate",
]

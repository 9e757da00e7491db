"""Recipes: complete runs by name."""

from dreamllm.recipes.registry import RECIPES, Recipe, recipe, run_recipe

__all__ = ["RECIPES", "Recipe", "recipe", "run_recipe"]

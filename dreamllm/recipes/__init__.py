"""Recipes: complete runs by name."""

from dreamllm.recipes.registry import RECIPES, Recipe

__all__ = ["RECIPES", "Recipe"]

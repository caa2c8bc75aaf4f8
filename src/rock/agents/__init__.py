"""Agents as recipes: which packages they have, and how they are run. Plain data; no package is imported here."""

from rock.agents.recipe import Recipe, RecipeError, builtin, load, names

__all__ = ["Recipe", "RecipeError", "builtin", "load", "names"]

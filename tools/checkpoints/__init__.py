"""Checkpoints with random weights and the shapes of published models."""

from .published import PUBLISHED
from .recipe import SCALES, Recipe
from .writer import write_checkpoint

__all__ = ["PUBLISHED", "SCALES", "Recipe", "write_checkpoint"]

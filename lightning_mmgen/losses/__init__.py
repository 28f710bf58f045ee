"""Loss functions, each with its equation and source, and the base of the loss terms that callbacks contribute."""

from .diffusion import diffusion_loss
from .term import DenoisingStep, LossTerm

__all__ = ["DenoisingStep", "LossTerm", "diffusion_loss"]

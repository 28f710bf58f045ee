"""Loss functions, each with its equation and source, and the base of the loss terms that callbacks contribute."""

from .consistency import composite, counted_mean, identity, latent_mask, outside, snr_weight, spatial, temporal, turns
from .diffusion import diffusion_loss
from .term import DenoisingStep, LossTerm

__all__ = [
    "DenoisingStep",
    "LossTerm",
    "composite",
    "counted_mean",
    "diffusion_loss",
    "identity",
    "latent_mask",
    "outside",
    "snr_weight",
    "spatial",
    "temporal",
    "turns",
]

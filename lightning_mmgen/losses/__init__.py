"""Loss functions, each with its equation and source, and the base of the loss terms that callbacks contribute."""

from .alignment import aggregate, alignment, channels, min_max
from .consistency import composite, counted_mean, earlier, identity, latent_mask, outside, snr_weight, spatial, temporal, touched, turns
from .diffusion import difference, diffusion_loss, squared_error
from .distillation import error_along, relative_error
from .language import language_loss
from .schedule import ExponentialSchedule, LinearSchedule
from .term import AnsweringStep, DenoisingStep, LossTerm

__all__ = [
    "AnsweringStep",
    "DenoisingStep",
    "ExponentialSchedule",
    "LinearSchedule",
    "LossTerm",
    "aggregate",
    "alignment",
    "channels",
    "composite",
    "counted_mean",
    "difference",
    "diffusion_loss",
    "earlier",
    "error_along",
    "identity",
    "language_loss",
    "latent_mask",
    "min_max",
    "outside",
    "relative_error",
    "snr_weight",
    "spatial",
    "squared_error",
    "temporal",
    "touched",
    "turns",
]

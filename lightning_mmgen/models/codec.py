"""Pixels to latents and back: the only place that knows the VAE's scale."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .loading import Weights
from .weights import locate


class Codec(nn.Module):
    """A frozen ``AutoencoderKL`` in float32 (SDXL's VAE overflows in float16), with its scaling and shift.

    Args:
        vae: the autoencoder.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        config: Any = vae.config
        self.factor = 2 ** (len(config.block_out_channels) - 1)  # pixels a latent
        self.channels = int(config.latent_channels)
        self.scale, self.shift = float(config.scaling_factor), float(config.shift_factor or 0.0)

    def train(self, mode: bool = True) -> Codec:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Pixels [b, 3, H, W] in [-1, 1] -> mean and log-variance of the posterior, [b, 2c, H/f, W/f]."""
        with _full_precision(pixels.device):
            parameters = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.parameters
        return parameters.contiguous()  # whatever the pictures' memory format, so that sums over latents have one order

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None = None, moments: Tensor | None = None) -> Tensor:
        """Pixels [b, 3, H, W] in [-1, 1] -> latents [b, c, H/f, W/f]: the posterior's mean, or with ``noise`` a sample of it.

        Args:
            moments: of these pixels, where they are known.
        """
        posterior = DiagonalGaussianDistribution(self.moments(pixels) if moments is None else moments)
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
        return (z.float() - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [b, c, h, w] -> pixels [b, 3, h*f, w*f], clipped to [-1, 1]."""
        return self.reconstruct(latents).clamp(-1, 1)

    @torch.no_grad()
    def decode_edit(self, latents: Tensor, pictures: Tensor, source: Tensor, tolerance: float) -> Tensor:
        """As :meth:`decode`, with the detail of its source that the VAE does not hold, where an edit leaves the source (our choice):

            x = D(z) + k (x_s - D(z_s)),  k = exp(-mean_c (z - z_s)^2 / tolerance)

        Where the latents are the source's, its own pixels come out, and an edit of an edit loses no more than an edit.

        Args:
            pictures, source: x_s [b, 3, H, W] in [-1, 1] and its latents z_s [b, c, H/f, W/f]; where those are zeros there is no source.
            tolerance: of squared latents.
        """
        kept = (-(latents - source).square().mean(1, keepdim=True) / tolerance).exp() * source.flatten(1).any(1).view(-1, 1, 1, 1)
        lost = pictures - self.reconstruct(source)
        return (self.reconstruct(latents) + interpolate(kept, lost.shape[-2:], mode="bilinear") * lost).clamp(-1, 1)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """As :meth:`decode`, but not clipped, and gradients reach the latents."""
        with _full_precision(latents.device):
            return self.vae.decode((latents.float() / self.scale + self.shift).to(self.vae.dtype)).sample.float()


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


@dataclass
class CodecConfig:
    """Which VAE: hub name or folder of a pipeline, or ``toybox/vae``; ``subfolder`` is none for a folder of its own."""

    pretrained: str = "stabilityai/stable-diffusion-xl-base-1.0"
    subfolder: str | None = "vae"

    def build(self, weights: Weights = True) -> Codec:
        """Load the VAE in float32, or (``weights=False``) create it from its configuration on the default device."""
        if weights:
            return Codec(AutoencoderKL.from_pretrained(locate(self.pretrained), subfolder=self.subfolder, torch_dtype=torch.float32))
        return Codec(AutoencoderKL.from_config(AutoencoderKL.load_config(locate(self.pretrained), subfolder=self.subfolder)))

"""The diffusion loss."""

from __future__ import annotations

from torch import Tensor


def diffusion_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """E_t w(t) || prediction - target ||^2, averaged over the latents (Ho et al. 2020, equation 14, with weights).

    Args:
        prediction, target: [b, c, h, w].
        weight: [b].

    Returns:
        A scalar in float32.
    """
    error = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))  # [b]
    return (weight * error).mean()

"""The diffusion loss."""

from __future__ import annotations

from torch import Tensor


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """|| prediction - target ||^2 of each sample, averaged over its latents: [b, c, h, w] each -> [b] in float32."""
    return (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))


def diffusion_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """E_t w(t) || prediction - target ||^2, averaged over the latents (Ho et al. 2020, equation 14, with weights).

    Args:
        prediction, target: [b, c, h, w].
        weight: [b].

    Returns:
        A scalar in float32.
    """
    return (weight * squared_error(prediction, target)).mean()


def difference(prediction: Tensor, target: Tensor) -> Tensor:
    """1/2 || (p_1 - p_2) - (t_1 - t_2) ||^2 of pairs, averaged over pairs and latents: [2 b, c, h, w] each, the second half the partners of
    the first -> a scalar in float32. With 1/2 || (p_1 + p_2) - (t_1 + t_2) ||^2 it makes up the squared error of a pair."""
    first, second = (prediction.float() - target.float()).chunk(2)
    return (first - second).square().mean() / 2

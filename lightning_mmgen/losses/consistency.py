"""The consistency penalty: an edit changes what its mask allows, and nothing else.

The post on edits without drift adds "a penalty for unnecessary changes in the latent space" and does not define it: these definitions are
ours. Latents are [b, c, h, w], soft masks [b, 1, h, w] at latent size, 1 where the edit may change, weights [b]; ``z0_hat`` is the estimate
of z_0 at timestep t. Terms are scalars in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, cosine_similarity, interpolate

DELTA = 1e-6


def snr_weight(snr: Tensor, cap: float = 5.0, floor: float = 0.0) -> Tensor:
    """w(t) = max(min(SNR(t), cap), floor), [b]: an estimate counts for as much as its noise level lets it know, and for ``floor`` at
    least."""
    return snr.clamp(floor, cap)


def latent_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask of pixels [b, 1, H, W] at latent ``size``, by area: what share of a latent's patch may change.

    Over 99 % counts as all of it: else the white of a JPEG, or the rounding of a resize, would leave an edit of all of the picture a little
    to keep everywhere, and the terms, which are means, would weigh that as much as a whole picture.
    """
    share = interpolate(mask.float(), size, mode="area")
    return torch.where(share > 0.99, 1.0, share)


def touched(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask of pixels at latent ``size``, by its maximum: which latents must be free, as some of their patch may change. A latent stands
    for the whole patch; one that is half the source's is no picture's."""
    return adaptive_max_pool2d(mask.float(), size)


def outside(error: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """w(t) sum((1 - m) error^2) / (C sum(1 - m) + delta) of each sample, [b].

    1 - m stands outside the square: the mean error of what must stay, whatever its area; 0 where nothing must stay.
    """
    keep = 1 - mask.float()
    squares = (keep * error.float().square()).sum(dim=(1, 2, 3))
    return weight * squares / (error.shape[1] * keep.sum(dim=(1, 2, 3)) + DELTA)


def spatial(z0_hat: Tensor, source: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """E w(t) ||z0_hat - z_s||^2 outside the mask: the estimate against the latents of the source."""
    return outside(z0_hat - source, mask, weight).mean()


def temporal(z0_hat: Tensor, teacher: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """E w(t) ||z0_hat(t) - sg z0_hat_EMA(t')||^2 outside the mask, t' < t and the same noise: a constant ``teacher`` that has seen less
    of the noise."""
    return outside(z0_hat - teacher.detach(), mask, weight).mean()


def earlier(seeds: Tensor, timesteps: Tensor) -> Tensor:
    """t' of each sample, [b]: uniform in 0..t-1 (0 for t = 0), from a generator of its own, which is not that of its noise."""
    drawn = []
    for seed, t in zip(seeds.tolist(), timesteps.tolist(), strict=True):
        drawn.append(torch.randint(max(t, 1), (), generator=torch.Generator().manual_seed(seed + 1)))
    return torch.stack(drawn).to(timesteps.device)


def turns(z0_hat: Tensor, previous: Tensor, mask: Tensor, weight: Tensor, turn: Tensor) -> Tensor:
    """E w(t) ||z0_hat - z_(k-1)||^2 outside the mask, over the samples with turn k >= 1 of a multi-turn edit.

    Args:
        previous: latents of turn k - 1.
        turn: [b], from 0; negative where a sample is no edit.
    """
    return counted_mean(outside(z0_hat - previous, mask, weight), turn >= 1)


def identity(features: Tensor, source_features: Tensor) -> Tensor:
    """1 - cos of two pictures' features, [b, d] each -> [b]; for edits of all of the picture, where the terms above vanish."""
    return 1 - cosine_similarity(features.float(), source_features.float(), dim=-1)


def composite(z_y: Tensor, z_s: Tensor, mask: Tensor) -> Tensor:
    """z* = m z_y + (1 - m) z_s: the target within the mask and the source outside it, for pairs that drift themselves."""
    return (mask * z_y + (1 - mask) * z_s).to(z_y.dtype)


def counted_mean(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of ``values`` [b] where ``counts`` [b] is True, over all ranks.

    A rank's part is its sum over the mean count of a rank, so that the average of all parts, which is what their gradients become, is the
    mean. A zero connected to the graph where nothing counts.
    """
    number = counts.sum().float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(number)
        number /= torch.distributed.get_world_size()
    return torch.where(counts, values, 0 * values).sum() / number.clamp(min=DELTA)

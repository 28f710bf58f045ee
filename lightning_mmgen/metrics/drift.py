"""Drift: what an edit changes beside what it was asked to change.

The degenerate optimum copies the source: drift is always reported beside a measure of the edit's success.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, normalize
from torchmetrics.functional.image import structural_similarity_index_measure

from ..models.dino import Dino
from .mean import PictureMean


class OutsideMean(PictureMean):
    """Base of the scores outside an edit mask, each of one picture, then averaged over the pictures.

    A picture of which nothing is outside is left out of the average; ``compute`` is nan if none is left.
    """

    @abstractmethod
    def outside(self, pictures: Tensor, sources: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """The score [b] of each picture, and [b] True where anything of it is outside; of float32 inputs as in ``score``."""

    def score(self, pictures: Tensor, sources: Tensor, masks: Tensor) -> Tensor:
        """Of edited pictures and their sources, [b]; nan where nothing is outside.

        Args:
            pictures, sources: [b, 3, h, w] in [-1, 1].
            masks: [b, 1, h, w] in [0, 1], 1 where the edit may change the picture.

        Raises:
            ValueError: the sizes differ, or a mask leaves [0, 1].
        """
        given = [tuple(t.shape) for t in (pictures, sources, masks)]
        if given[0] != given[1] or given[2] != (given[0][0], 1, *given[0][2:]):
            raise ValueError(f"pictures {given[0]}, sources {given[1]} and masks {given[2]} must be of one size, masks of one channel")
        masks = masks.float()
        if masks.numel() and not 0 <= masks.min() <= masks.max() <= 1:
            raise ValueError(f"masks must be in [0, 1]; they are in [{masks.min():g}, {masks.max():g}]")
        scores, counted = self.outside(pictures.float(), sources.float(), masks)
        return scores.where(counted, torch.nan)


def outside_mean(values: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of ``values`` [b, c, h, w] over channels and pixels, each pixel with weight 1 - m, m of [b, 1, h, w].

    Returns:
        The mean [b], nan where all weights are 0, and [b] True where they are not.
    """
    weights = 1 - masks
    area = weights.sum((1, 2, 3))
    return (values.mean(1, keepdim=True) * weights).sum((1, 2, 3)) / area, area > 0


def composited(pictures: Tensor, sources: Tensor, masks: Tensor) -> Tensor:
    """The pictures, with the source inside the mask, [b, 3, h, w]."""
    return torch.lerp(pictures, sources, masks.expand_as(pictures))


class MaskedMSE(OutsideMean):
    """Mean squared error of pixels, scaled to [0, 1], outside the mask."""

    def outside(self, pictures: Tensor, sources: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        return outside_mean(((pictures - sources) / 2).square(), masks)


class MaskedPSNR(MaskedMSE):
    """Peak signal-to-noise ratio outside the mask in dB, -10 log10 MSE of pixels scaled to [0, 1], at most 100 (identical there)."""

    CAP = 100.0

    def outside(self, pictures: Tensor, sources: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        error, counted = super().outside(pictures, sources, masks)
        return (-10 * error.log10()).clamp(max=self.CAP), counted


class MaskedSSIM(OutsideMean):
    """Structural similarity (Wang et al. 2004, Gaussian window of 11 pixels, sigma 1.5) outside the mask.

    Inside the mask both pictures are the source. The local values are averaged, with weight 1 - m, over the windows that lie in the
    picture; m is the largest value of the mask in the window.
    """

    WINDOW = 11

    def outside(self, pictures: Tensor, sources: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        if min(pictures.shape[-2:]) < self.WINDOW:
            raise ValueError(f"pictures of {tuple(pictures.shape[-2:])} pixels are smaller than the window of {self.WINDOW}")
        composite = composited(pictures, sources, masks)
        first, second = ((p.double() + 1) / 2 for p in (composite, sources))  # float32 would round the variance of flat areas
        _, local = structural_similarity_index_measure(first, second, sigma=1.5, data_range=1.0, return_full_image=True)
        r = self.WINDOW // 2
        return outside_mean(local[..., r:-r, r:-r], max_pool2d(masks, self.WINDOW, stride=1))


class StructureDistance(PictureMean):
    """Mean squared difference of the self-similarities of edited picture and source (Tumanyan et al. 2022).

    A self-similarity is the matrix of cosines of the keys of DINO's last attention layer, class token and all. PnP Inversion
    (Ju et al. 2023) reports it of ``facebook/dino-vitb8``, times 1000. It sees layout, not colours, and needs no mask.

    Args:
        pretrained: hub name or folder of a DINO.
    """

    def __init__(self, pretrained: str = "facebook/dino-vitb8") -> None:
        super().__init__()
        self.dino = Dino.from_pretrained(pretrained)

    def score(self, pictures: Tensor, sources: Tensor) -> Tensor:
        """Of edited pictures and their sources, each [b, 3, H, W] in [-1, 1], [b]."""
        first, second = (normalize(self.dino.keys(p), dim=-1) for p in (pictures, sources))  # [b, n, d]
        return (first @ first.mT - second @ second.mT).square().mean((1, 2))

"""FID and KID: how far the features of generated pictures are from those of real ones, as distributions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ..models.features import Features

INCEPTION = "inception"


class FID(FrechetInceptionDistance):
    """Frechet distance (Heusel et al. 2017). Distances of different features are never compared, nor of different numbers of pictures.

    Args:
        features: ``inception`` for the published ones (extra ``fid``); hub name or folder of any :class:`~..models.features.Features`; or a
            module that turns pictures [b, 3, h, w] in [-1, 1] into [b, d].

    Raises:
        ModuleNotFoundError: ``inception`` without the extra.
    """

    def __init__(self, features: str | nn.Module = INCEPTION) -> None:
        super().__init__(feature=feature_module(features), normalize=features == INCEPTION, input_img_size=(3, 64, 64))

    def update(self, pictures: Tensor, real: Tensor) -> None:  # type: ignore[override]
        """Generated pictures and real ones, [b, 3, H, W] in [-1, 1] each; their numbers may differ."""
        for group, is_real in ((pictures, False), (real, True)):
            if len(group):
                super().update(_scaled(group, self.used_custom_model), is_real)


class KID(KernelInceptionDistance):
    """Kernel distance (Binkowski et al. 2018), mean over random subsets; unbiased, so that it suits few pictures.

    Args:
        features: as in :class:`FID`.
        subsets: how many are drawn.
        subset_size: pictures in each, no more than there are.
    """

    def __init__(self, features: str | nn.Module = INCEPTION, subsets: int = 100, subset_size: int = 1000) -> None:
        super().__init__(feature=feature_module(features), subsets=subsets, subset_size=subset_size, normalize=features == INCEPTION)

    def update(self, pictures: Tensor, real: Tensor) -> None:  # type: ignore[override]
        """Generated pictures and real ones, [b, 3, H, W] in [-1, 1] each; their numbers may differ."""
        for group, is_real in ((pictures, False), (real, True)):
            if len(group):
                super().update(_scaled(group, self.used_custom_model), is_real)

    def compute(self) -> Tensor:  # type: ignore[override]
        """The mean over the subsets."""
        mean, _ = super().compute()
        return mean


def feature_module(features: str | nn.Module) -> Any:
    """What torchmetrics takes: 2048 for Inception's, or a module."""
    if features == INCEPTION:
        return 2048
    return Features(features) if isinstance(features, str) else features


def _scaled(pictures: Tensor, own_module: bool) -> Tensor:
    """In [0, 1], as torchmetrics gives Inception its pictures; as they are for a module of one's own."""
    return pictures if own_module else (pictures.clamp(-1, 1) + 1) / 2

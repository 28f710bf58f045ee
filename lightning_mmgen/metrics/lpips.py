"""LPIPS outside an edit mask."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d, normalize
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from ..models.encoder import imagenet_normalised
from ..models.weights import locate
from .drift import OutsideMean, composited, outside_mean

TRAINED = ("alex", "vgg", "squeeze")


class MaskedLPIPS(OutsideMean):
    """Perceptual distance (Zhang et al. 2018, equation 1) outside the mask: squared distances of feature vectors of length 1, their
    channels weighted, averaged over each level and summed over the levels of a network.

    Inside the mask both pictures are the source. A level is averaged with weight 1 - m; m is the largest value of the mask in the cell
    of the feature map. (A cell's receptive field is larger: it may hold pixels of the mask, which are the same in both pictures.)

    Only ``alex``, ``vgg`` and ``squeeze`` have the trained weights of the paper, v0.1, as ``torchmetrics`` has them: published numbers are
    theirs. Of any other network the weights are 1 unless given (the paper's baselines without calibration): compare these among themselves.

    Args:
        network: ``alex``, ``vgg`` or ``squeeze`` (extra ``lpips``); hub name or folder of any backbone of ``transformers`` that takes
            pictures with ImageNet's mean and deviation (ResNet, Swin, DINOv2, ...); or a module that turns pictures [b, 3, h, w] in [-1, 1]
            into a list of feature maps [b, c, h', w'], one a level.
        weights: of the channels, [c] a level, for a module of one's own.

    Raises:
        ImportError: a network of torchvision is named and it is not installed.
    """

    def __init__(self, network: str | nn.Module = "alex", weights: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        if isinstance(network, str):
            network, weights = trained(network) if network in TRAINED else (Backbone(network), weights)
        self.network = network.requires_grad_(False)
        self.weights = None if weights is None else nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)

    def outside(self, pictures: Tensor, sources: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        self.network.eval()
        levels = list(zip(self.network(composited(pictures, sources, masks)), self.network(sources), strict=True))
        means, counted = [], []
        for (first, second), weight in zip(levels, self.weights or [None] * len(levels), strict=True):
            local = (normalize(first, dim=1) - normalize(second, dim=1)).square()  # [b, c, h', w']
            local = (local if weight is None else local * weight[:, None, None]).sum(1, keepdim=True)
            mean, some = outside_mean(local, adaptive_max_pool2d(masks, first.shape[-2:]))
            means.append(mean)
            counted.append(some)
        return torch.stack(means).sum(0), torch.stack(counted).all(0)


class Backbone(nn.Module):
    """All stages of a backbone of ``transformers``, of pictures of any size.

    Args:
        pretrained: hub name or folder.

    Raises:
        ValueError: it is no backbone.
    """

    def __init__(self, pretrained: str) -> None:
        super().__init__()
        config = AutoConfig.from_pretrained(locate(pretrained))
        if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
            raise ValueError(f"{pretrained}: transformers has no backbone of a {config.model_type}; of a resnet it has")
        model = MODEL_FOR_BACKBONE_MAPPING[type(config)]  # AutoBackbone itself asks the hub, of a folder too
        stages = config.stage_names[1:]  # without the stem
        self.model = model.from_pretrained(locate(pretrained), out_features=stages, dtype=torch.float32)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Pictures [b, 3, h, w] in [-1, 1] -> feature maps [b, c, h', w'], one a stage."""
        return list(self.model(pixel_values=imagenet_normalised(pictures)).feature_maps)


def trained(name: str) -> tuple[nn.Module, list[Tensor]]:
    """The network and the channel weights of LPIPS v0.1.

    Raises:
        ImportError: torchvision is not installed.
    """
    if find_spec("torchvision") is None:
        raise ImportError(f"LPIPS with {name} needs torchvision: pip install 'lightning_mmgen[lpips]'")
    from torchmetrics.functional.image.lpips import _LPIPS

    lpips: Any = _LPIPS(net=cast(Any, name))
    return nn.Sequential(lpips.scaling_layer, lpips.net), [level.model[-1].weight.flatten() for level in lpips.lins]

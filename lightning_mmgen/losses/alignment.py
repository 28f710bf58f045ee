"""Alignment of attention with given maps (Jin et al. 2025, Diffusion Instruction Tuning; "Lavender", section 3).

Maps are [n, h, w], one a word; of a layer's heads [n, heads, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

EPS = 1e-6
Aggregation = Literal["mean", "max", "layers_first", "max_max", "flow_product", "flow_sum"]


def min_max(maps: Tensor) -> Tensor:
    """(a - min a) / (max a - min a + eps) of each map [..., h, w], in float32."""
    low, high = maps.float().aminmax(dim=-1, keepdim=True)
    low, high = low.amin(-2, keepdim=True), high.amax(-2, keepdim=True)
    return (maps.float() - low) / (high - low + EPS)


def alignment(maps: Tensor, targets: Tensor) -> Tensor:
    """MSE(A_w, S_w) of each word, [n]: over the pixels of a map and its target, both in [0, 1]."""
    return (maps.float() - targets.float()).square().mean(dim=(1, 2))


def channels(how: Aggregation, heads: Sequence[int]) -> list[int]:
    """The channels of each Aligner that an aggregation needs, for layers of so many heads.

    Raises:
        ValueError: ``layers_first`` for layers of different numbers of heads.
    """
    if how in ("mean", "max"):
        return list(heads)
    if how == "layers_first":
        if len(set(heads)) > 1:
            raise ValueError(f"layers_first averages heads over layers, which have {sorted(set(heads))} heads; choose layers of equal ones")
        return [heads[0]]
    return [1]


def aggregate(layers: Sequence[Tensor], aligners: Sequence[Callable[[Tensor], Tensor]], how: Aggregation) -> Tensor:
    """The maps of all layers and heads as one a word, in [0, 1] (Lavender, appendix: aggregation).

    ``mean`` and ``max``: Align_l(A_l), over the layers l. ``layers_first``: Align(mean_l A_l). ``max_max``: Align(max_l max_heads A_l).
    ``flow_product`` and ``flow_sum``: Align of the product or the sum over layers of the heads' means; a product is divided by its largest
    value, or many layers would leave nothing of it.

    Args:
        layers: [n, heads, h, w] each.
        aligners: as many as :func:`channels` says, [n, channels, h, w] -> [n, h, w].

    Returns:
        [n, h, w], min-max normalised.
    """
    if how in ("mean", "max"):
        aligned = torch.stack([align(maps) for align, maps in zip(aligners, layers, strict=True)])
        return min_max(aligned.mean(0) if how == "mean" else aligned.amax(0))
    if how == "layers_first":
        joined = torch.stack(list(layers)).mean(0)
    elif how == "max_max":
        joined = torch.stack([maps.amax(1, keepdim=True) for maps in layers]).amax(0)
    else:
        means = torch.stack([maps.mean(1, keepdim=True) for maps in layers])
        joined = means.sum(0) if how == "flow_sum" else _scaled_product(means)
    return min_max(aligners[0](joined))


def _scaled_product(maps: Tensor) -> Tensor:
    """The product of maps [layers, n, 1, h, w] over the layers, divided by its largest value."""
    logs = maps.clamp(min=torch.finfo(maps.dtype).tiny).log().sum(0)
    return (logs - logs.amax(dim=(-2, -1), keepdim=True)).exp()

"""What the module would predict with other weights than its own, for terms of the loss that learn from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_mmgen.batch import Batch, Condition
from lightning_mmgen.shards import is_sharded

from .ema import evaluation_mode, holding

if TYPE_CHECKING:
    from lightning_mmgen.module import MultimodalDiffusion


class Taught(NamedTuple):
    """A prediction [b, c, h, w], and what the UNet attended to."""

    prediction: Tensor
    condition: Condition


@torch.no_grad()
def taught(
    module: MultimodalDiffusion, weights: Mapping[str, Tensor], batch: Batch, z_t: Tensor, timesteps: Tensor, source: Tensor | None
) -> Taught:
    """A prediction from the prompt on, without dropout or gradients; nothing of the module changes.

    Args:
        weights: of what is trained, by name, as this process holds them; the module's own where there are none.
        batch: whose prompts are read.
        z_t: [b, c, h, w].
        timesteps: [b].
        source: latents beside z_t, for a UNet that takes them.
    """
    height, width = batch.target.shape[-2:]
    with evaluation_mode(module), lent(module, weights):
        condition = module.condition(batch)._replace(source=source)
        return Taught(module(z_t, timesteps, condition, (height, width)), condition)


@contextmanager
def lent(module: MultimodalDiffusion, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The module has these values of what is trained within this block, in the memory that they are in where it holds its parameters
    whole: nothing is written, so that a graph recorded before stays whole."""
    own = module.trainable() if weights else {}
    if any(map(is_sharded, own.values())):
        with holding(module, weights):
            yield
        return
    kept = {name: parameter.data for name, parameter in own.items()}
    for name, parameter in own.items():
        parameter.data = weights[name].to(parameter.dtype)
    try:
        yield
    finally:
        for name, parameter in own.items():
            parameter.data = kept[name]

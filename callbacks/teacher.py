"""What the module would predict with other weights than its own, for terms of the loss that learn from it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_mmgen.batch import Batch
from lightning_mmgen.shards import is_sharded

from .ema import evaluation_mode, holding

if TYPE_CHECKING:
    from lightning_mmgen.module import MultimodalDiffusion


@torch.no_grad()
def taught(
    module: MultimodalDiffusion, weights: Mapping[str, Tensor], batch: Batch, z_t: Tensor, timesteps: Tensor, source: Tensor | None
) -> Tensor:
    """A prediction [b, c, h, w] from the prompt on, without dropout or gradients; nothing of the module changes.

    Args:
        weights: of what is trained, by name, as this process holds them; what is not there stays as it is.
        batch: whose prompts are read.
        z_t: [b, c, h, w].
        timesteps: [b].
        source: latents beside z_t, for a UNet that takes them.
    """
    shared = any(map(is_sharded, module.trainable().values()))
    own = {} if shared else {f"module.{n}": w.to(module.get_parameter(n).dtype) for n, w in weights.items()}
    with evaluation_mode(module), holding(module, weights) if shared and weights else nullcontext():
        return functional_call(_Pass(module), own, (batch, z_t, timesteps, source))  # type: ignore[no-any-return]


class _Pass(nn.Module):
    """From prompts to a prediction in one forward, for ``functional_call``."""

    def __init__(self, module: MultimodalDiffusion) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch, z_t: Tensor, timesteps: Tensor, source: Tensor | None) -> Tensor:
        height, width = batch.target.shape[-2:]
        condition = self.module.condition(batch)._replace(source=source)
        return self.module(z_t, timesteps, condition, (height, width))

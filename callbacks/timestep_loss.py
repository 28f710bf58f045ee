"""Loss by timestep."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from lightning_mmgen.losses import DenoisingStep, LossTerm, squared_error

from .loggers import LoggedCallback, log_values

if TYPE_CHECKING:
    from lightning_mmgen.module import MultimodalDiffusion


class TimestepLoss(LossTerm, LoggedCallback):
    """Logs ``timestep_loss/<first>-<last>``: the unweighted error of the prediction, averaged over the samples since the last log whose
    timestep lies in the bin, on all ranks. It adds nothing to the loss, and no forward pass.

    Args:
        bins: of equal width.
    """

    def __init__(self, bins: int = 10) -> None:
        super().__init__()
        if bins < 1:
            raise ValueError(f"TimestepLoss: bins must be 1 or more, not {bins}")
        self.bins = bins
        self.sums: Tensor | None = None  # [2, bins]: errors, samples

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.diffusion = cast("MultimodalDiffusion", pl_module).diffusion
        self.module = pl_module

    @torch.no_grad()
    def compute(self, step: DenoisingStep) -> dict[str, Tensor]:
        if self.module.training and isinstance(step, DenoisingStep):
            error = squared_error(step.prediction, self.diffusion.target(step.z0, step.noise, step.timesteps))
            found = torch.stack([error, torch.ones_like(error)])  # [2, b]
            if self.sums is None:
                self.sums = torch.zeros(2, self.bins, device=error.device)
            self.sums.index_add_(1, step.timesteps.to(error.device) * self.bins // self.diffusion.train_timesteps, found)
        return {}

    def log_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.sums is None:
            return
        errors, counts = trainer.strategy.reduce(self.sums, reduce_op="sum").tolist()
        last = self.diffusion.train_timesteps
        edges = [-(-k * last // self.bins) for k in range(self.bins + 1)]
        names = [f"timestep_loss/{low:04d}-{high - 1:04d}" for low, high in zip(edges, edges[1:], strict=False)]
        log_values(trainer, {name: e / n for name, e, n in zip(names, errors, counts, strict=True) if n}, trainer.global_step)
        self.sums = None

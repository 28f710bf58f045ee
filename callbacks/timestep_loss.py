"""Loss by timestep."""

from __future__ import annotations

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from lightning_mmgen.diffusion import Diffusion
from lightning_mmgen.losses import DenoisingStep, LossTerm, squared_error

from .loggers import LoggedCallback, log_values


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
        self.module, self.diffusion = pl_module, getattr(pl_module, "diffusion", None)  # a module of another kind has none

    @torch.no_grad()
    def compute(self, step: DenoisingStep) -> dict[str, Tensor]:
        if self.module.training and isinstance(self.diffusion, Diffusion):
            error = squared_error(step.prediction, self.diffusion.target(step.z0, step.noise, step.timesteps))
            sums = torch.zeros(2, self.bins, device=error.device) if self.sums is None else self.sums
            found = torch.stack([error, torch.ones_like(error)])  # [2, b]
            self.sums = sums.index_add(1, step.timesteps.to(error.device) * self.bins // self.diffusion.train_timesteps, found)
        return {}

    def log_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(self.diffusion, Diffusion):
            return
        sums = torch.zeros(2, self.bins, device=pl_module.device) if self.sums is None else self.sums
        errors, counts = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        last = self.diffusion.train_timesteps
        edges = [-(-k * last // self.bins) for k in range(self.bins + 1)]
        names = [f"timestep_loss/{low:04d}-{high - 1:04d}" for low, high in zip(edges, edges[1:], strict=False)]
        log_values(trainer, {name: e / n for name, e, n in zip(names, errors, counts, strict=True) if n}, trainer.global_step)
        self.sums = None

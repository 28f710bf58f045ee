"""The difference between the samples of a pair, as a term of the loss."""

from __future__ import annotations

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from lightning_mmgen.losses import DenoisingStep, LossTerm, difference


class PairDifference(LossTerm):
    """Asks that the prediction change as its target does from one sample of a pair to the other, which shares its noise and timestep
    (:class:`~lightning_mmgen.data.pairs.PairedDataModule`): lambda :func:`~lightning_mmgen.losses.difference`.

    The squared error of a pair is half that of its sum and half that of its difference. In the sum lies all that the condition leaves open,
    which at large timesteps is most of the error and noise to whoever learns from it; in the difference it cancels, and what a
    condition changes is left. Antithetic sampling of the gradient, with a weight of its own on the part that it cleans.

    Args:
        weight: lambda.

    Raises:
        ValueError: a batch does not hold pairs.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.module = pl_module

    def compute(self, step: DenoisingStep) -> dict[str, Tensor]:
        if not self.module.training:  # held-out rows are no pairs
            return {}
        seeds = step.batch.seed
        if len(seeds) % 2 or not torch.equal(*seeds.chunk(2)):
            raise ValueError("PairDifference: the second half of a batch must be the partners of the first (data: PairedDataModule)")
        target = self.module.diffusion.target(step.z0, step.noise, step.timesteps)  # type: ignore[operator, union-attr]
        return {"difference": difference(step.prediction, target)}

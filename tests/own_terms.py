"""Loss terms of a user's own, started by ``class_path``."""

from __future__ import annotations

from torch import Tensor

from lightning_mmgen.losses import DenoisingStep, LossTerm


class Brightness(LossTerm):
    """Pulls the mean of the estimate of z_0 to that of z_0."""

    def compute(self, step: DenoisingStep) -> dict[str, Tensor]:
        return {"brightness": (step.z0_hat.mean() - step.z0.mean()).square()}


class Overflow(LossTerm):
    """Not a number in step ``at``, counted from 0; nothing before."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def compute(self, step: DenoisingStep) -> dict[str, Tensor]:
        self.left -= 1
        return {"overflow": step.prediction.sum() * (0.0 if self.left >= 0 else float("nan"))}

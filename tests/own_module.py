"""The README's subclass of the LightningModule: its own loss, started by ``class_path``."""

from __future__ import annotations

from torch import Tensor

from lightning_mmgen.losses import DenoisingStep
from lightning_mmgen.module import MultimodalDiffusion


class HuberDiffusion(MultimodalDiffusion):
    """A Huber loss on the estimate of z_0 beside the diffusion loss."""

    def __init__(self, huber: float = 0.1, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__init__(**kwargs)
        self.huber = huber

    def loss(self, step: DenoisingStep) -> dict[str, Tensor]:
        distance = (step.z0_hat - step.z0).abs()
        return {**super().loss(step), "huber": self.huber * distance.clamp(max=1).mul(distance).mean()}

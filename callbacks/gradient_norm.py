"""Gradient norm of every row of the parameter table."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from .loggers import is_logged, log_values


class GradientNorm(Callback):
    """Logs ``gradient_norm/<row>``, the 2-norm before clipping, at the steps that the trainer logs; at the others it costs nothing.

    A row whose gradients the strategy keeps to itself (DeepSpeed) is left out.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = trainer.global_step + 1
        if not is_logged(trainer, step):
            return
        norms = {}
        for state in getattr(getattr(pl_module, "table", None), "states", ()):
            if gradients := [p.grad for _, p in state.parameters if p.grad is not None]:
                norm = get_total_norm(gradients)
                norms[f"gradient_norm/{state.row.match}"] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if norms:
            log_values(trainer, norms, step)

"""A run that is told to stop saves itself first."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lightning_mmgen.folder import run_folder

STOPPED = 128 + signal.SIGTERM
"""The exit status of a run that has saved itself: 143."""


class Preemption(Callback):
    """On SIGTERM, to whichever process, all of them end the optimizer step together, write ``last.ckpt``, and exit with status 143.

    The handler only sets a flag: a collective within it, as Lightning's own has, would meet the other processes in the middle of another.
    """

    def __init__(self) -> None:
        self.told = False
        self.step = -1
        self.before: Any = None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.told = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        self.before = signal.signal(signal.SIGTERM, self._note)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            return  # gradients are still accumulating
        self.step = trainer.global_step
        if not self._anyone(trainer):
            return
        folder = run_folder(trainer)
        if folder is not None:
            trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
        raise SystemExit(STOPPED)

    def _anyone(self, trainer: Trainer) -> bool:
        """Whether any process was told; all of them ask."""
        if trainer.world_size == 1:
            return self.told
        told = torch.tensor(float(self.told), device=trainer.strategy.root_device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signal.signal(signal.SIGTERM, self.before or signal.SIG_DFL)

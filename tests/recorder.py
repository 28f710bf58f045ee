"""A callback that writes every loss of a run, exactly, and can end its process as ``kill -9`` would."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class LossRecorder(Callback):
    """Args: out: a JSONL file. kill_at: end the process after this many steps, before any checkpoint of that step."""

    def __init__(self, out: str, kill_at: int | None = None) -> None:
        self.out, self.kill_at = Path(out), kill_at

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        row = {
            "step": trainer.global_step,
            "loss": float(outputs["loss"]).hex(),
            "ids": batch.ids,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
        }
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

"""A callback that writes every loss of a run, exactly, and can end its process as ``kill -9`` would."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from time import perf_counter
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning_mmgen.callbacks.throughput import peak_memory


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


class RankRecorder(Callback):
    """Writes what each rank sees of a run, a row a batch, to ``<out>.<rank>.jsonl``.

    Args:
        out: the files' path, without rank and ending.
        kill_at: rank 0 ends all processes after this many batches, as ``kill -9`` would.
        term_at: rank 1 gets SIGTERM after this many batches.
    """

    def __init__(self, out: str, kill_at: int | None = None, term_at: int | None = None) -> None:
        self.out, self.kill_at, self.term_at = Path(out), kill_at, term_at
        self.built = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.built = peak_memory(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        seen = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        row = {
            "batch": seen,
            "loss": float(outputs["loss"]) * trainer.accumulate_grad_batches,
            "ids": batch.ids,
            "time": perf_counter(),
            "built": self.built,
            "peak": peak_memory(pl_module.device),
            "lr": {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups},
        }
        with self.out.with_name(f"{self.out.name}.{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if seen == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if seen == self.term_at and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

"""Callbacks that write every loss of a run, exactly, and can end its process as ``kill -9`` would."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning_mmgen.callbacks.throughput import peak_memory
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_mmgen.shards import local, part


class LossRecorder(Callback):
    """Args: out: a JSONL file."""

    def __init__(self, out: str) -> None:
        self.out = Path(out)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        row = {
            "step": trainer.global_step,
            "loss": float(outputs["loss"]).hex(),
            "ids": batch.ids,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
        }
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


class RankRecorder(Callback):
    """Writes what each rank sees of a run, a row a batch, to ``<out>.<rank>.jsonl``.

    Args:
        out: the files' path, without rank and ending.
        kill_at: a process ends after this many batches, as ``kill -9`` would.
        rank: which; all of them if none is given.
        term_at: the last rank gets SIGTERM after this many batches.
    """

    def __init__(self, out: str, kill_at: int | None = None, rank: int | None = None, term_at: int | None = None) -> None:
        self.out, self.kill_at, self.rank, self.term_at = Path(out), kill_at, rank, term_at
        self.before = self.built = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Comes before ``configure_model``."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        self.before = resident_peak()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for parameter in pl_module.parameters():
            local(part(parameter)).sum()  # a single process's lie in the file until they are used
        self.built = resident_peak() - self.before

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        seen = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        row = {
            "batch": seen,
            "loss": float(outputs["loss"]) * trainer.accumulate_grad_batches,
            "ids": batch.ids,
            "edits": 0 if batch.edit is None else int(batch.edit.visible.sum()),
            "time": perf_counter(),
            "built": self.built,
            "peak": peak_memory(pl_module.device),
            "lr": {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups},
        }
        with self.out.with_name(f"{self.out.name}.{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if seen == self.kill_at and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), signal.SIGKILL)
        if seen == self.term_at and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


class BuiltRecorder(RankRecorder):
    """Writes the bytes that a process took to build to ``<out>.<rank>.json``, and what came out, a digest of every tensor, to
    ``<out>.json``."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.out.with_name(f"{self.out.name}.{trainer.global_rank}.json").write_text(json.dumps({"built": self.built}))
        tensors = {name: whole(p, part(p)) for name, p in pl_module.named_parameters()} | dict(pl_module.named_buffers())
        if trainer.is_global_zero:
            found = {name: digest(tensor) for name, tensor in tensors.items()}
            self.out.with_name(f"{self.out.name}.json").write_text(json.dumps(found))


def whole(parameter: Any, held: Tensor) -> Tensor:
    """The whole of what the processes hold of a parameter; every process calls it."""
    if isinstance(held, DTensor):
        return held.full_tensor()
    if not hasattr(parameter, "ds_tensor"):
        return held
    parts = held.new_empty(dist.get_world_size() * held.numel())
    dist.all_gather_into_tensor(parts, held.contiguous())
    return parts[: parameter.ds_numel].view(parameter.ds_shape)


def digest(tensor: Tensor) -> str:
    """Dtype, shape and bits."""
    bits = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(bits).hexdigest()}"


def resident_peak() -> float:
    """Bytes that the process had resident at most (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * float(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))

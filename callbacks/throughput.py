"""Samples a second, the wait for data, and the peak of memory."""

from __future__ import annotations

import resource
from time import perf_counter
from typing import Any

import torch
from lightning import LightningModule, Trainer

from .held_out import HeldOutCallback
from .loggers import LoggedCallback, log_values


class Throughput(LoggedCallback):
    """Logs, as means since the last log, ``throughput/samples_per_second`` (of all ranks, taken to be alike), ``throughput/step_seconds``
    (of an optimizer step) and ``throughput/waiting`` (share of the time between batches: loading, checkpoints, other callbacks), all
    without the time of evaluations; ``throughput/peak_memory_gb`` of the device, or of the process where there is none; and
    ``throughput/hours`` of the run so far, evaluations and earlier sessions included.

    It comes first among the callbacks, so that a batch ends for it before the others begin. It does not synchronise the device.
    """

    def __init__(self) -> None:
        self.seconds = 0.0  # of earlier sessions
        self._clear()

    def _clear(self) -> None:
        self.samples = self.steps = 0
        self.busy = self.idle = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.started = perf_counter()
        self.ended: float | None = None
        self.begun = self.started

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.begun = perf_counter()
        looked = any(isinstance(c, HeldOutCallback) and c.looked == trainer.global_step for c in trainer.callbacks)  # type: ignore[attr-defined]
        if self.ended is not None and not looked:
            self.idle += self.begun - self.ended

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any) -> None:
        self.ended = perf_counter()
        self.busy += self.ended - self.begun
        size = getattr(batch, "size", 0)
        self.samples += size if isinstance(size, int) else 0
        self.steps += trainer.global_step != self.step
        super().on_train_batch_end(trainer, pl_module)

    def log_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        whole = self.busy + self.idle
        values = {
            "samples_per_second": self.samples * trainer.world_size / whole,
            "step_seconds": whole / self.steps,
            "waiting": self.idle / whole,
            "peak_memory_gb": peak_memory(pl_module.device) / 1e9,
            "hours": self.elapsed() / 3600,
        }
        log_values(trainer, {f"throughput/{name}": value for name, value in values.items()}, trainer.global_step)
        self._clear()

    def elapsed(self) -> float:
        """Seconds of training so far."""
        return self.seconds + perf_counter() - self.started

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]


def peak_memory(device: torch.device) -> float:
    """Bytes that tensors held at most on a CUDA device, or that the process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

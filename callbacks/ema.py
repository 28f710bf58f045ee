"""Exponential moving average of what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_mmgen.shards import part, part_of, piece, put


class EMA(Callback):
    """Keeps an average of the trained weights in float32; evaluation, pictures and export use it, training does not.

    Frozen weights are not copied. The average is part of the checkpoint; where processes share a weight, they share its average.

    Args:
        decay: of one optimizer step; it starts lower, as (1 + n) / (10 + n) after n steps.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"EMA decay must lie between 0 and 1, not {decay}")
        self.decay, self.updates, self.step = decay, 0, 0
        self.mean: dict[str, Tensor] = {}
        self.module: LightningModule | None = None  # whose weights the average follows

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mean, self.module = copies(pl_module, self.mean, torch.float32), pl_module
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            return  # gradients are still accumulating
        self.step, self.updates = trainer.global_step, self.updates + 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [part(p).float() for p in pl_module.trainable().values()]  # type: ignore[operator]
        torch._foreach_lerp_(list(self.mean.values()), weights, 1 - decay)

    def swapped(self, pl_module: LightningModule) -> AbstractContextManager[None]:
        """The module holds the averaged weights within this block."""
        return holding(pl_module, self.mean)

    def state_dict(self) -> dict[str, Any]:
        if self.module is None:
            return {"updates": self.updates, "mean": self.mean}
        return {"updates": self.updates, "mean": pieces(self.module, self.mean)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates, self.mean, self.module = state_dict["updates"], state_dict["mean"], None


def copies(pl_module: LightningModule, saved: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """This process's copies of what is trained: of the ``saved`` values, and of the weights where there is none."""
    weights = pl_module.trainable()  # type: ignore[operator]
    found = {n: part_of(p, saved[n]) if n in saved else part(p) for n, p in weights.items()}
    return {n: value.to(part(weights[n]).device, dtype, copy=True) for n, value in found.items()}


def pieces(pl_module: LightningModule, held: Mapping[str, Tensor]) -> dict[str, Any]:
    """Such copies as a checkpoint takes them."""
    return {n: piece(pl_module.get_parameter(n), value) for n, value in held.items()}


@contextmanager
def holding(pl_module: LightningModule, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The module holds these values of what is trained within this block, each as this process holds the weight."""
    weights = pl_module.trainable()  # type: ignore[operator]
    kept = {n: part(p).clone() for n, p in weights.items()}
    for n, p in weights.items():
        put(p, values[n])
    try:
        yield
    finally:
        for n, p in weights.items():
            put(p, kept[n])


def averaged(trainer: Trainer) -> EMA | None:
    """The trainer's :class:`EMA`, once it holds an average."""
    return next((c for c in trainer.callbacks if isinstance(c, EMA) and c.mean), None)  # type: ignore[attr-defined]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within this block; each part's own mode after it."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def evaluation(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Evaluate without a trace: averaged weights if an :class:`EMA` is on, evaluation mode, no gradients, and the generators of
    the process left as they were."""
    ema = averaged(trainer)
    with isolate_rng(), torch.no_grad(), ema.swapped(pl_module) if ema else nullcontext(), evaluation_mode(pl_module):
        yield

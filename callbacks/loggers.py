"""Texts and pictures on any logger that takes them, and when a callback logs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL.Image import Image


def log_text(trainer: Trainer, name: str, markdown: str) -> None:
    """A text at the current step: to TensorBoard, and to every logger with Lightning's ``log_text`` (Weights & Biases)."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, markdown, trainer.global_step)
        elif hasattr(logger, "log_text"):
            logger.log_text(key=name, columns=["text"], data=[[markdown]], step=trainer.global_step)


def log_picture(trainer: Trainer, name: str, picture: Image) -> None:
    """A picture at the current step: to TensorBoard, and to every logger with Lightning's ``log_image`` (Weights & Biases)."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(picture), trainer.global_step, dataformats="HWC")
        elif hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[picture], step=trainer.global_step)


def log_values(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Scalars to every logger at an optimizer step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step)


_latest: WeakKeyDictionary[Trainer, dict[str, float]] = WeakKeyDictionary()


def log_scores(trainer: Trainer, scores: Mapping[str, float]) -> None:
    """The scores of an evaluation, by their full names (``held_out/clip_t``), at the current step."""
    _latest.setdefault(trainer, {}).update(scores)
    log_values(trainer, scores, trainer.global_step)


def latest_scores(trainer: Trainer) -> dict[str, float]:
    """The last value of every score of this process's evaluations, by full name."""
    return dict(_latest.get(trainer, {}))


class LoggedCallback(Callback):
    """A callback with something to log at every optimizer step that the trainer logs (``log_every_n_steps``), on all ranks."""

    step = -1

    @abstractmethod
    def log_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log; ``trainer.global_step`` steps are done."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            return  # gradients are still accumulating
        self.step = trainer.global_step
        if is_logged(trainer, self.step):
            self.log_step(trainer, pl_module)


def is_logged(trainer: Trainer, step: int) -> bool:
    """Whether the trainer logs optimizer step ``step``, counted from 1."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step % every == 0

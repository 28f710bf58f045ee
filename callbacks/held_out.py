"""Pictures of the held-out instructions, drawn once a step and shared by the callbacks that look at them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_mmgen.data.datamodule import MultimodalDataModule, sample_seed
from lightning_mmgen.pipeline import MultimodalPipeline
from lightning_mmgen.prompt import Record

from .ema import evaluation


class HeldOut(NamedTuple):
    """Held-out records and the pictures [n, 3, H, W] in [-1, 1] that the model draws for them."""

    records: list[Record]
    pictures: Tensor


_drawn: WeakKeyDictionary[Trainer, tuple[int, HeldOut]] = WeakKeyDictionary()


def held_out(trainer: Trainer, pl_module: LightningModule, count: int, batch_size: int = 32) -> HeldOut:
    """Draw the first ``count`` held-out records, in the data's ``target_size``, with the averaged weights if there are any; the noise of
    each is fixed.

    Pictures of the same step are not drawn twice.
    """
    count = 2 if trainer.fast_dev_run else count  # type: ignore[attr-defined]
    step, kept = _drawn.get(trainer, (-1, None))
    if kept is None or step != trainer.global_step or len(kept.records) < count:
        data: MultimodalDataModule = trainer.datamodule  # type: ignore[attr-defined]
        records = data.held_out_records(count)
        with evaluation(trainer, pl_module):
            pictures = sample(MultimodalPipeline.of(pl_module), records, batch_size, side=data.target_size)  # type: ignore[arg-type]
        kept = HeldOut(records, pictures)
        _drawn[trainer] = (trainer.global_step, kept)
    return HeldOut(kept.records[:count], kept.pictures[:count])


class HeldOutCallback(Callback, ABC):
    """When a callback looks at the held-out pictures: every ``every`` optimizer steps, and after the last one.

    Args:
        every: optimizer steps between looks; 0 for the last one only.
        count: held-out instructions.
    """

    at_start: ClassVar[bool] = False
    """Whether it looks before the first step of a run too."""

    def __init__(self, every: int, count: int) -> None:
        self.every, self.count = every, count
        self.step = self.looked = -1

    @abstractmethod
    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the callback does with the pictures of this step."""

    def table(self) -> str:
        """What it has found, before and after, for the end of a run; "" for nothing."""
        return ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        if self.at_start and trainer.global_step == 0:  # not where a run goes on
            self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            return  # gradients are still accumulating
        self.step = trainer.global_step
        if self.every and self.step % self.every == 0 and self.step != trainer.max_steps:
            self.looked = self.step
            self.look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self.looked:
            self.look(trainer, pl_module)


def sample(pipeline: MultimodalPipeline, records: list[Record], batch_size: int = 32, seed: int = 0, side: int | None = None) -> Tensor:
    """Pictures [n, 3, side, side] for records, in batches, in the UNet's own size if no ``side`` in pixels is given; the noise of record i
    follows from (seed, i)."""
    pipeline.set_progress_bar_config(disable=True)
    out = []
    for at in range(0, len(records), batch_size):
        chunk = records[at : at + batch_size]
        noise = [torch.Generator().manual_seed(sample_seed(seed, 0, at + i)) for i in range(len(chunk))]
        prompts = [r.prompt() for r in chunk]
        drawn = pipeline(prompts, height=side, width=side, generator=noise, output_type="pt").images
        assert isinstance(drawn, Tensor)
        out.append(drawn.cpu())
    return torch.cat(out)

"""Pictures of the held-out instructions, drawn once a step and shared by the callbacks that look at them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_mmgen.data.datamodule import MultimodalDataModule
from lightning_mmgen.data.recipe import sample_seed
from lightning_mmgen.pipeline import MultimodalPipeline
from lightning_mmgen.prompt import Record

from .ema import evaluation


class HeldOut(NamedTuple):
    """Held-out records and the pictures [n, 3, H, W] in [-1, 1] that the model draws for them."""

    records: list[Record]
    pictures: Tensor


KEPT = 256  # pictures of a step that are kept for the next callback; a suite has thousands

_drawn: WeakKeyDictionary[Trainer, tuple[int, HeldOut]] = WeakKeyDictionary()


def held_out(trainer: Trainer, pl_module: LightningModule, count: int, batch_size: int = 32, seconds: float | None = None) -> HeldOut:
    """The first ``count`` held-out records and their pictures; see :func:`held_out_parts`."""
    parts = [part for _, part in held_out_parts(trainer, pl_module, count, batch_size, seconds)]
    return _joined(parts) if parts else _empty(trainer)


def held_out_parts(
    trainer: Trainer, pl_module: LightningModule, count: int, batch_size: int = 32, seconds: float | None = None
) -> Iterator[tuple[int, HeldOut]]:
    """Draw the first ``count`` held-out records, or all of them where it is 0, part by part: the place of the first of each part, and the
    part. Every rank draws its share and gets all of them.

    They are drawn in the data's ``target_size``, with the averaged weights if there are any; the noise of each is fixed. Pictures of the
    same step are not drawn twice, as far as they fit into what is kept.

    Args:
        batch_size: of one rank.
        seconds: no further part is begun after this time on any rank; what the caller does with a part counts too.
    """
    data: MultimodalDataModule = trainer.datamodule  # type: ignore[attr-defined]
    count = held_out_count(trainer, count)
    step, kept = _drawn.get(trainer, (-1, _empty(trainer)))
    kept = kept if step == trainer.global_step else _empty(trainer)
    began, at = time.monotonic(), 0
    while at < count:
        if at and seconds is not None and trainer.strategy.reduce_boolean_decision(time.monotonic() - began > seconds, all=False):
            return
        if at < len(kept.records):
            end = min(len(kept.records), count, at + batch_size * trainer.world_size)
            part = HeldOut(kept.records[at:end], kept.pictures[at:end])
        else:
            records = data.held_out_records(min(batch_size * trainer.world_size, count - at), at)
            part = HeldOut(records, draw(trainer, pl_module, records, range(at, at + len(records))))
            if at + len(records) <= KEPT:
                kept = _joined([kept, part])
                _drawn[trainer] = (trainer.global_step, kept)
        yield at, part
        at += len(part.records)


def held_out_count(trainer: Trainer, count: int) -> int:
    """How many held-out records there are to look at, of ``count`` (0 for all)."""
    source = trainer.datamodule.held_out  # type: ignore[attr-defined]
    there = 0 if source is None else len(source)
    return min(count or there, there, 2 if trainer.fast_dev_run else there)  # type: ignore[attr-defined]


def draw(trainer: Trainer, pl_module: LightningModule, records: Sequence[Record], places: Sequence[int]) -> Tensor:
    """Pictures [n, 3, side, side] of records with the noise of these places among the held-out ones. Every rank draws an equal share (the
    last record again where there are not enough) and gets all of them."""
    own = share(trainer, len(records))
    side = trainer.datamodule.target_size  # type: ignore[attr-defined]
    with evaluation(trainer, pl_module):
        pipeline = MultimodalPipeline.of(pl_module)  # type: ignore[arg-type]
        drawn = sample(pipeline, [records[i] for i in own], len(own), side=side, places=[places[i] for i in own])
    return gathered(trainer, drawn, len(records))


def share(trainer: Trainer, count: int) -> list[int]:
    """This rank's of ``count`` things, as many as every other rank's: the last one again where there are not enough."""
    world = trainer.world_size
    return [min(i, count - 1) for i in range(trainer.global_rank, -(-count // world) * world, world)]


def gathered(trainer: Trainer, own: Tensor, count: int) -> Tensor:
    """What every rank has of its share [m, ...], in the order of all ``count``: row i is rank i % world's."""
    if trainer.world_size == 1:
        return own[:count]
    every = trainer.strategy.all_gather(own.to(trainer.strategy.root_device)).cpu()  # [world, m, ...]
    return every.transpose(0, 1).flatten(0, 1)[:count]


def _empty(trainer: Trainer) -> HeldOut:
    side = trainer.datamodule.target_size  # type: ignore[attr-defined]
    return HeldOut([], torch.empty(0, 3, side, side))


def _joined(parts: Sequence[HeldOut]) -> HeldOut:
    return HeldOut([r for part in parts for r in part.records], torch.cat([part.pictures for part in parts]))


class HeldOutCallback(Callback, ABC):
    """When a callback looks at the held-out pictures: every ``every`` optimizer steps, after the last one, and in a
    test.

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

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.look(trainer, pl_module)


def sample(
    pipeline: MultimodalPipeline,
    records: list[Record],
    batch_size: int = 32,
    seed: int = 0,
    side: int | None = None,
    places: Sequence[int] | None = None,
) -> Tensor:
    """Pictures [n, 3, side, side] for records, in batches, in the UNet's own size if no ``side`` in pixels is given; the noise of record i
    follows from (seed, i), or from (seed, places[i])."""
    pipeline.set_progress_bar_config(disable=True)
    out = []
    for at in range(0, len(records), batch_size):
        chunk = records[at : at + batch_size]
        noise = [
            torch.Generator().manual_seed(sample_seed(seed, 0, place)) for place in (places or range(len(records)))[at : at + batch_size]
        ]
        prompts = [r.prompt() for r in chunk]
        drawn = pipeline(prompts, height=side, width=side, generator=noise, output_type="pt").images
        assert isinstance(drawn, Tensor)
        out.append(drawn.cpu())
    return torch.cat(out)

"""What the consistency penalty adds to a training step, alternating in one process.

    OMP_NUM_THREADS=2 python benchmarks/penalty_overhead.py [--pairs 40]

Trains the toybox's experiment on edits, with an average of the weights. Of every four steps one has no penalty, one ``spatial``, one
``spatial`` and ``temporal``, and one ``spatial`` and ``pixels``, in an order that rotates. A step is what happens between the hooks of its
batch: forward, backward, clipping, optimizer, average; not the reading of the batch. Prints the medians of the pairwise ratios to the
steps without a penalty.
Bars: 1.05 with ``spatial``, 1.55 with ``temporal``.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning_mmgen.callbacks import EMA, ConsistencyPenalty
from step_overhead import ROOT, compare

from lightning_mmgen.cli import main as lightning

VARIANTS = {"no penalty": {"spatial": 0.0}, "spatial": {}, "spatial and temporal": {"temporal": 1.0}, "spatial and pixels": {"pixels": 1.0}}
"""Weights of the penalty's terms; that of ``spatial`` is 1."""


class Rotate(Callback):
    """Sets a step's penalty and takes its time."""

    def __init__(self, penalty: ConsistencyPenalty) -> None:
        self.given = {name: ConsistencyPenalty(**weights).schedules for name, weights in VARIANTS.items()}
        self.penalty, self.seconds = penalty, {name: list[float]() for name in VARIANTS}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        turn, place = divmod(batch_idx, len(VARIANTS))
        self.name = list(VARIANTS)[(turn + place) % len(VARIANTS)]
        self.penalty.schedules = self.given[self.name]
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds[self.name].append(time.perf_counter() - self.start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=40)
    args = parser.parse_args()
    warmup, source = 2, {"class_path": "ToyboxSource", "init_args": {"tasks": {"edit": 1.0}}}
    steps = len(VARIANTS) * (args.pairs + warmup)
    edits = [
        "--data.class_path=EditDataModule",
        f"--data.init_args.train={json.dumps(source)}",
        "--data.init_args.held_out=null",
        "--data.init_args.batch_size=8",
    ]
    experiment = ["-c", str(ROOT / "experiments/instruct.yaml"), f"--trainer.max_steps={steps}", "--trainer.callbacks=null"]
    cli = lightning([*experiment, *edits], run=False)
    penalty = ConsistencyPenalty()
    rotate = Rotate(penalty)
    cli.trainer.callbacks += [EMA(0.99), penalty, rotate]
    cli.trainer.fit(cli.model, cli.datamodule)
    plain, *others = ((name, seconds[warmup:]) for name, seconds in rotate.seconds.items())
    for name, seconds in others:
        compare(name, seconds, *plain)


if __name__ == "__main__":
    main()

"""What an evaluation costs beside drawing its pictures, alternating in one process.

    OMP_NUM_THREADS=2 python benchmarks/evaluation_cost.py [--pairs 8] [--count 64]

Trains the toybox's experiment. After every other step the held-out instructions are drawn and nothing else; after the others they are drawn
and evaluated: CLIP score, instruction following, likeness to the references and copy-paste without the probes that draw again, rows and
pictures to the run folder, scalars to TensorBoard. Which of the two comes first changes from pair to pair; the first pair, which also
writes the references and targets, is left out. Prints the median of the pairwise ratios of processor time, and what each evaluation takes.
Bar: 1.1.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning_mmgen.callbacks import CLIPScoreEvaluation, FollowingEvaluation, ReferenceEvaluation, held_out
from step_overhead import ROOT, compare

from lightning_mmgen.cli import main as lightning


class Alternate(Callback):
    """Draws, or draws and evaluates, after each step, and takes the time."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.looks = [CLIPScoreEvaluation(count=count), FollowingEvaluation(count=count), ReferenceEvaluation(count=count, probes=0)]
        self.drawn: list[float] = []
        self.evaluated: list[float] = []
        self.parts: defaultdict[str, list[float]] = defaultdict(list)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for look in self.looks:
            look.setup(trainer, pl_module, stage)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        turn, place = divmod(batch_idx, 2)
        begun = mark = time.process_time()
        held_out(trainer, pl_module, self.count)
        if (turn + place) % 2 == 0:
            self.drawn.append(time.process_time() - begun)
            return
        for look in self.looks:
            start = time.process_time()
            look.look(trainer, pl_module)  # the pictures of this step are there
            mark = time.process_time()
            self.parts[type(look).__name__].append(mark - start)
        self.evaluated.append(mark - begun)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--count", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        experiment = ["-c", str(ROOT / "experiments/instruct.yaml"), "--trainer.callbacks=null", "--data.init_args.batch_size=1"]
        run = [f"--trainer.max_steps={2 * args.pairs + 2}", f"--trainer.logger.init_args.save_dir={folder}"]
        cli = lightning([*experiment, *run], run=False)
        alternate = Alternate(args.count)
        cli.trainer.callbacks.append(alternate)
        cli.trainer.fit(cli.model, cli.datamodule)
    compare("drawn and evaluated", alternate.evaluated[1:], "drawn", alternate.drawn[1:], "look")
    for name, seconds in alternate.parts.items():
        print(f"{name:<24}{statistics.median(seconds[1:]) * 1e3:9.1f} ms")


if __name__ == "__main__":
    main()

"""Figures of record for instruction following and object consistency on the toybox.

    python benchmarks/following.py [--runs DIR] [--seeds 1 2 3] [--count 256] [--steps N]

Trains ``experiments/instruct.yaml`` once a seed, and its controls once, then lets the oracle read the pictures that each model draws for
the held-out instructions. Rows: the base on captions alone; before; after; each reference replaced by its words; references swapped at
random in training. 95 % intervals are bootstraps over pictures; over seeds, the spread of the seeds' means is printed beside.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from lightning_mmgen.callbacks import sample

from lightning_mmgen.cli import main as lightning
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.metrics.following import ToyboxFollowing, interval
from lightning_mmgen.module import MultimodalDiffusion
from lightning_mmgen.pipeline import MultimodalPipeline
from lightning_mmgen.prompt import Record
from lightning_mmgen.tools.generate import load_module

ROOT = Path(__file__).resolve().parent.parent


def records(tasks: dict[str, float], count: int) -> list[Record]:
    """The first held-out records, as ``experiments/instruct.yaml`` evaluates on."""
    source = ToyboxSource(tasks, length=256, held_out=True)
    return [source.record(i) for i in range(count)]


def in_words(record: Record) -> Record:
    """Every reference replaced by the words for the toy that it shows."""
    truth, text = record.extra["truth"], record.instruction
    for (k, marker), reference in zip(truth.shown, record.references, strict=True):
        text = text.replace(f"[ref#{marker}] {reference.phrase}".strip(), truth.scene.toys[k].toy.words())
    return replace(record, instruction=text, references=())


def draw(module: MultimodalDiffusion, wanted: list[Record], seed: int) -> ToyboxFollowing:
    """Sample and score."""
    metric = ToyboxFollowing()
    metric.update(sample(MultimodalPipeline.of(module), wanted, seed=seed), [r.extra["truth"] for r in wanted])
    return metric


def train(runs: Path, name: str, seed: int, *more: str) -> Path:
    """One fit of the experiment; its last checkpoint."""
    args = ["fit", "-c", str(ROOT / "experiments/instruct.yaml"), f"--seed_everything={seed}", f"--data.init_args.seed={seed}"]
    args += [f"--trainer.logger.init_args.save_dir={runs}", f"--trainer.logger.init_args.name={name}"]
    cli = lightning([*args, "--trainer.callbacks={class_path: EMA, init_args: {decay: 0.99}}", *more])
    cli.trainer.save_checkpoint(out := Path(cli.trainer.log_dir or runs) / "checkpoints" / "last.ckpt")
    return out


def row(name: str, metrics: list[ToyboxFollowing]) -> None:
    """One line: mean over seeds, the interval over pictures, the spread over seeds."""
    cells = []
    for key in ("following", "strict", "consistency"):
        values = [torch.cat(getattr(m, key)) for m in metrics]
        if not sum(map(len, values)):
            cells.append(f"{'-':>24}")
            continue
        means = [float(v.mean()) for v in values]
        cells.append(f"{np.mean(means):.3f} ± {float(interval(torch.cat(values))):.3f} (seeds {np.ptp(means):.3f})".rjust(24))
    print(f"{name:<38}" + "  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/following"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, help="of training; the experiment's own by default")
    args = parser.parse_args()
    shown, told = records({"subject": 1.0}, args.count), records({"caption": 1.0}, args.count)
    start = time.monotonic()
    steps = [f"--trainer.max_steps={args.steps}"] if args.steps else []
    after = [load_module(train(args.runs, f"seed{s}", s, *steps)) for s in args.seeds]
    swapped = load_module(train(args.runs, "swapped", args.seeds[0], "--data.init_args.train.init_args.swap_references=true", *steps))
    base = lightning(["-c", str(ROOT / "experiments/instruct.yaml")], run=False).model
    base.configure_model()
    base.eval()
    print(f"\n{args.count} held-out instructions, seeds {args.seeds}, trained in {time.monotonic() - start:.0f} s")
    print(f"{'':<38}{'following':>24}  {'all conditions':>24}  {'consistency':>24}")
    seeds = args.seeds
    row("base, captions", [draw(base, told, s) for s in seeds])
    row("before", [draw(base, shown, s) for s in seeds])
    row("after", [draw(m, shown, s) for m, s in zip(after, seeds, strict=True)])
    row("after, captions", [draw(m, told, s) for m, s in zip(after, seeds, strict=True)])
    row("words instead of references (base)", [draw(base, [in_words(r) for r in shown], s) for s in seeds])
    row("references swapped in training", [draw(swapped, shown, s) for s in seeds])


if __name__ == "__main__":
    main()

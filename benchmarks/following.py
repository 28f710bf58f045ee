"""Figures of record for instruction following and object consistency on the toybox.

    python benchmarks/following.py [--runs DIR] [--seeds 1 2 3] [--steps 520] [--count 256] [--jobs 2]

Trains ``experiments/instruct.yaml`` once a seed, for the first seed its control (references swapped at random, from the base) too, then
lets the oracle read the pictures that each model draws for the held-out instructions. 95 % intervals are bootstraps over pictures; the
spread of the seeds' means is printed beside. What a run measured is kept beside its checkpoint: a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import torch
from claims.jobs import DATA, MODEL, Job, arguments, first_seed, fit, shipped, started, work
from lightning_mmgen.callbacks import sample

from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.metrics.following import SCORES, ToyboxFollowing, interval
from lightning_mmgen.pipeline import MultimodalPipeline
from lightning_mmgen.prompt import Record

ROWS = {
    "base, captions": ("base", "told"),
    "before (base)": ("base", "shown"),
    "before (stage 1)": ("stage 1", "shown"),
    "after": ("after", "shown"),
    "after, captions": ("after", "told"),
    "words instead of references (base)": ("base", "words"),
    "references swapped in training": ("swapped", "shown"),
}
"""Of the table: the run, and what its prompts are."""


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


def prompts(kind: str, count: int) -> list[Record]:
    """Held-out instructions that show their toys, or tell them, or those that show with ``words`` instead."""
    own = records({"caption" if kind == "told" else "subject": 1.0}, count)
    return [in_words(r) for r in own] if kind == "words" else own


def measure(job: Job) -> dict[str, list[float]]:
    """Train, sample and score."""
    if job.name in ("base", "stage 1"):
        module = shipped() if job.name == "base" else started()
    else:
        swapped = [f"{DATA}.train.init_args.swap_references=true", f"{MODEL}.start=null"]
        module = fit(job, ["instruct.yaml"], swapped if job.name == "swapped" else [])
    out = {}
    for kind in (kind for run, kind in ROWS.values() if run == job.name):
        metric, wanted = ToyboxFollowing(), prompts(kind, job.count)
        metric.update(sample(MultimodalPipeline.of(module), wanted, seed=job.seed), [r.extra["truth"] for r in wanted])
        out |= {f"{kind} {score}": torch.cat(getattr(metric, score)).tolist() for score in SCORES}
    return out


def cell(runs: list[list[float]]) -> str:
    """Mean over seeds, the interval over pictures, the spread over seeds."""
    if not any(runs):
        return f"{'-':>28}"
    means = [np.mean(run) for run in runs]
    every = torch.tensor([*itertools.chain(*runs)])
    return f"{np.mean(means):.3f} ± {float(interval(every)):.3f} (seeds {np.ptp(means):.3f})".rjust(28)


def main() -> None:
    args = arguments("runs/following", 256, steps=520)
    scores = work(args, [["after"]], measure) | work(first_seed(args), [["base", "stage 1", "swapped"]], measure)
    print(f"\n{args.count} held-out instructions, seeds {args.seeds}, {args.steps} steps")
    print(f"{'':<38}{'following':>28}{'all conditions':>28}{'consistency':>28}")
    for name, (run, kind) in ROWS.items():
        own = [scores[run, s] for s in args.seeds if (run, s) in scores]
        print(f"{name:<38}" + "".join(cell([found[f"{kind} {c}"] for found in own]) for c in SCORES[:3]))


if __name__ == "__main__":
    main()

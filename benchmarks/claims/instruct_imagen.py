"""What Instruct-Imagen's paper found, measured on the toybox by its oracle (Hu et al. 2024, Figure 4 and Table 3).

    python benchmarks/claims/instruct_imagen.py [--runs DIR] [--seeds 1 2 3] [--stage-1 2800] [--steps 240] [--count 32] [--jobs 2]

Trains stage 1 of ``experiments/retrieval.yaml`` at the toybox's size once, then stage 2 of ``experiments/instruct_imagen_sdxl.yaml`` and
the baselines (no instructions, one task at a time, no stage 1) once a seed. Prints SC, PQ and O per task and composition for every model,
then the claims with their 95 % intervals over the seeds (Student's t). What a run measured is kept beside its checkpoint: a stopped
benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
from jobs import DATA, MODEL, Job, arguments, claim, fit, share, work
from lightning_mmgen.callbacks import grid, sample
from PIL.Image import Image
from rated import overall, rate

from lightning_mmgen.data.instructions import DATA_SETS, InstructionRecipe, raw, read_templates
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.module import MultimodalDiffusion
from lightning_mmgen.pipeline import MultimodalPipeline
from lightning_mmgen.prompt import Record
from lightning_mmgen.toybox.tasks import COMPOSITIONS

TOYBOX = ("overlays/toybox.yaml", "overlays/toybox_references.yaml", "overlays/references_both.yaml")
TASKS = {name: DATA_SETS[name] for name in ("internal", "depth", "mask", "edge", "sketch", "subjects", "styled", "style_transfer")}
"""The in-domain tasks, each by the first data set that has it."""
MODELS = ("full", "no retrieval", "multi-task")
Scores = dict[str, list[tuple[float, float]]]  # by task: SC and PQ of every picture

# -- runs ------------------------------------------------------------------------------------------------------------------------


def measure(job: Job) -> dict[str, Any]:
    """Train and measure."""
    stage_1, task = f"{MODEL}.start={job.shared('retrieval').checkpoint}", job.name.removeprefix("only ")
    if job.name == "retrieval":
        fit(job, ["retrieval.yaml", *TOYBOX, "overlays/toybox_retrieval.yaml"], [])
        return {}
    if task in TASKS:  # the single-task models share the steps
        job, more = job._replace(steps=max(job.steps // len(TASKS), 1)), [stage_1, f"{DATA}.ratios={json.dumps({task: 1.0})}"]
    else:
        more = [f"{MODEL}.start=null" if job.name == "no retrieval" else stage_1]
    without = task in TASKS or job.name == "multi-task"  # the baselines take raw inputs (section 5)
    more += [f"{DATA}.instructions=false"] if without else []
    module = fit(job, ["instruct_imagen_sdxl.yaml", *TOYBOX], more)
    wanted, start = [task] if task in TASKS else [*TASKS, *COMPOSITIONS], time.monotonic()
    scores: dict[str, Any] = {name: rate(module, records(name, job.count, without), job.seed) for name in wanted}
    seconds = (time.monotonic() - start) / (job.count * len(wanted))
    if job.name == "full":
        page(module, job.seed).save(job.folder / "pictures.png")
    return scores | {"seconds a picture": seconds}


# -- pictures --------------------------------------------------------------------------------------------------------------------


def records(name: str, count: int, without_instructions: bool) -> list[Record]:
    """Held-out records of a task or a composition, as prompts."""
    task = TASKS[name].toybox if name in TASKS else name
    source = ToyboxSource({task: 1.0}, length=max(count, 1), held_out=True, told=True)
    own = [source.record(i) for i in range(count)]
    if name not in TASKS:
        return [raw(r) for r in own] if without_instructions else own
    templates = {TASKS[name].task: read_templates(TASKS[name].task)}
    recipe = InstructionRecipe(64, 64, None, templates, edge_dilation=0, instructions=not without_instructions)
    return [recipe.compose(replace(r, task=name), None, np.random.default_rng(i)) for i, r in enumerate(own)]


def page(module: MultimodalDiffusion, seed: int) -> Image:
    """Two held-out prompts of every task and composition, and what the model draws."""
    shown = [r for name in (*TASKS, *COMPOSITIONS) for r in records(name, 2, False)]
    return grid(shown, None, sample(MultimodalPipeline.of(module), shown, seed=seed, side=64), cell=80, columns=2)


# -- tables ----------------------------------------------------------------------------------------------------------------------


def mean_o(scores: Scores, names: tuple[str, ...]) -> float:
    """O of the paper (sqrt of mean SC x mean PQ), averaged over tasks."""
    return float(np.mean([overall(scores[name]).o for name in names]))


def table(found: dict[str, list[Scores]]) -> None:
    """SC / PQ / O (and O of ImagenHub) per task and model, means over the seeds."""
    print(f"\n{'':<28}" + "".join(f"{name:>30}" for name in found))
    for group, names in (("in-domain", tuple(TASKS)), ("zero-shot", tuple(COMPOSITIONS))):
        for task in names:
            cells = []
            for runs in found.values():
                own = [overall(run[task])[:4] for run in runs if task in run]
                cells.append("/".join(f"{x:.2f}" for x in np.mean(own, 0)) if own else "-")
            print(f"{task:<28}" + "".join(f"{cell:>30}" for cell in cells))
        whole = {name: runs for name, runs in found.items() if all(task in runs[0] for task in names)}
        cells = [f"{np.mean([mean_o(run, names) for run in whole[name]]):.3f}" if name in whole else "-" for name in found]
        print(f"{group + ' mean O':<28}" + "".join(f"{cell:>30}" for cell in cells))
    print(f"{'seconds a picture':<28}" + "".join(f"{np.mean([r['seconds a picture'] for r in runs]):>30.2f}" for runs in found.values()))


def main() -> None:
    more = argparse.ArgumentParser(add_help=False)
    more.add_argument("--stage-1", type=int, default=2800, help="optimizer steps of stage 1")
    args = arguments("runs/claims/instruct_imagen", 32, more, steps=240)
    share(args, "retrieval", args.stage_1, measure)
    scores = work(args, [["full", "no retrieval", "multi-task", *(f"only {task}" for task in TASKS)]], measure)
    found = {model: [scores[model, s] for s in args.seeds] for model in MODELS}
    single = []
    for s in args.seeds:
        own = {task: scores[f"only {task}", s] for task in TASKS}
        seconds = float(np.mean([run["seconds a picture"] for run in own.values()]))
        single.append({task: run[task] for task, run in own.items()} | {"seconds a picture": seconds})
    table(found | {"single-task": single})
    inside, outside = tuple(TASKS), tuple(COMPOSITIONS)
    gains = zip(found["full"], found["multi-task"], found["no retrieval"], strict=True)
    over = [(mean_o(a, inside) - mean_o(b, inside), mean_o(a, outside) - mean_o(c, outside)) for a, b, c in gains]
    print("\n" + claim("in-domain mean O", [mean_o(run, inside) for run in found["full"]], ">=", 0.75))
    print(claim("zero-shot mean O", [mean_o(run, outside) for run in found["full"]], ">=", 0.55))
    print(claim("instructions over none (multi-task), in-domain O", [a for a, _ in over], ">=", 0.2))
    print(claim("stage 1 over none, zero-shot O", [b for _, b in over], ">=", 0.05))


if __name__ == "__main__":
    main()

"""What Instruct-Imagen's paper found, measured on the toybox by its oracle (Hu et al. 2024, Figure 4 and Table 3).

    python benchmarks/claims/instruct_imagen.py [--runs DIR] [--seeds 1 2 3] [--steps 760] [--count 32] [--jobs 2]

Trains both stages of ``experiments/retrieval.yaml`` and ``experiments/instruct_imagen_sdxl.yaml`` at the toybox's size, and the baselines
(no instructions, one task at a time, no stage 1), once a seed. Prints SC, PQ and O per task and composition for every model, then the
claims with their 95 % intervals over the seeds (Student's t). What a run measured is kept beside its checkpoint: a stopped benchmark goes
on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_mmgen.callbacks import sample
from scipy import stats

from lightning_mmgen.cli import main as lightning
from lightning_mmgen.data.instructions import DATA_SETS, InstructionRecipe, raw, read_templates
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.metrics.following import toybox_rating
from lightning_mmgen.metrics.ratings import Ratings
from lightning_mmgen.module import MultimodalDiffusion
from lightning_mmgen.pipeline import MultimodalPipeline
from lightning_mmgen.prompt import Record
from lightning_mmgen.tools.generate import load_module
from lightning_mmgen.toybox.tasks import COMPOSITIONS

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
MODEL, DATA = "--model.init_args", "--data.init_args"
TOYBOX = ("overlays/toybox.yaml", "overlays/toybox_references.yaml", "overlays/references_both.yaml")
TASKS = {name: DATA_SETS[name] for name in ("internal", "depth", "mask", "edge", "sketch", "subjects", "styled", "style_transfer")}
"""The in-domain tasks, each by the first data set that has it."""
MODELS = ("full", "no retrieval", "multi-task")
BARS = {"in-domain": 0.75, "zero-shot": 0.55}
Scores = dict[str, list[tuple[float, float]]]  # by task: SC and PQ of every picture

# -- runs ------------------------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One run of one seed."""

    name: str
    seed: int
    runs: str
    steps: int
    count: int
    threads: int

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name.replace(" ", "_") / f"seed{self.seed}"


def checkpoint(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / "last.ckpt"


def fit(job: Job, recipe: str, more: list[str]) -> MultimodalDiffusion:
    """One training, or what it left."""
    last = checkpoint(job.folder)
    if not last.is_file():
        args = [x for f in (recipe, *TOYBOX) for x in ("-c", str(EXPERIMENTS / f))]
        args += [f"--seed_everything={job.seed}", f"{DATA}.seed={job.seed}", f"--trainer.max_steps={job.steps}"]
        args += ["--trainer.callbacks={class_path: EMA, init_args: {decay: 0.99}}", "--trainer.enable_progress_bar=false"]
        run = (("save_dir", job.folder.parent), ("name", job.folder.name), ("version", "run"))
        args += [f"--trainer.logger.init_args.{k}={v}" for k, v in run]
        lightning(["fit", *args, *more]).trainer.save_checkpoint(last)
    return load_module(last)


def work(job: Job) -> None:
    """Train and measure; what is there already is kept."""
    if (job.folder / "scores.json").is_file():
        return
    torch.set_num_threads(job.threads)
    stage_1 = f"{MODEL}.start={checkpoint(job._replace(name='retrieval').folder)}"
    task = job.name.removeprefix("only ")
    if job.name == "retrieval":
        module = fit(job, "retrieval.yaml", [])
    elif task in TASKS:  # as many steps as its share of an eighth of them all
        more = [stage_1, f"{DATA}.ratios={json.dumps({task: 1.0})}"]
        module = fit(job._replace(steps=max(job.steps // len(TASKS), 1)), "instruct_imagen_sdxl.yaml", more)
    else:
        more = [f"{MODEL}.start=null" if job.name == "no retrieval" else stage_1]
        more += [f"{DATA}.instructions=false"] if job.name == "multi-task" else []
        module = fit(job, "instruct_imagen_sdxl.yaml", more)
    scores: dict[str, Any] = {}
    if job.name != "retrieval":
        wanted = [task] if task in TASKS else [*TASKS, *COMPOSITIONS]
        start = time.monotonic()
        scores = {name: rate(module, records(name, job.count, job.name == "multi-task"), job.seed) for name in wanted}
        scores["seconds a picture"] = (time.monotonic() - start) / sum(map(len, scores.values()))
    (job.folder / "scores.json").write_text(json.dumps(scores))
    print(f"{job.name}, seed {job.seed}: done", flush=True)


# -- pictures --------------------------------------------------------------------------------------------------------------------


def records(name: str, count: int, without_instructions: bool) -> list[Record]:
    """Held-out records of a task or a composition, as prompts."""
    task = TASKS[name].toybox if name in TASKS else name
    source = ToyboxSource({task: 1.0}, length=max(count, 1), held_out=True, told=True)
    own = [source.record(i) for i in range(count)]
    if name not in TASKS:
        if not without_instructions:
            return own
        return [replace(r, instruction=raw(r.caption, r.references)) for r in own]
    templates = {TASKS[name].task: read_templates(TASKS[name].task)}
    recipe = InstructionRecipe(64, 64, None, templates, edge_dilation=0, instructions=not without_instructions)
    return [recipe.compose(replace(r, task=name), None, np.random.default_rng(i)) for i, r in enumerate(own)]


def rate(module: MultimodalDiffusion, wanted: list[Record], seed: int) -> list[tuple[float, float]]:
    """SC and PQ of a picture for each record."""
    drawn = sample(MultimodalPipeline.of(module), wanted, seed=seed, side=64)
    arrays = ((drawn.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [toybox_rating(array, record.extra["truth"]) for array, record in zip(arrays, wanted, strict=True)]


# -- tables ----------------------------------------------------------------------------------------------------------------------


def overall(scores: list[tuple[float, float]]) -> tuple[float, float, float, float]:
    """SC, PQ, and O in both forms."""
    metric = Ratings()
    sc, pq = torch.tensor(scores).T
    metric.update(sc, pq)
    values = metric.compute()
    return tuple(float(values[k]) for k in ("sc", "pq", "o_instruct_imagen", "o_imagenhub"))  # type: ignore[return-value]


def mean_o(scores: Scores, names: tuple[str, ...]) -> float:
    """O of the paper (sqrt of mean SC x mean PQ), averaged over tasks."""
    return float(np.mean([overall(scores[name])[2] for name in names]))


def table(found: dict[str, list[Scores]]) -> None:
    """SC / PQ / O (and O of ImagenHub) per task and model, means over the seeds."""
    print(f"\n{'':<28}" + "".join(f"{name:>30}" for name in found))
    for group, names in (("in-domain", tuple(TASKS)), ("zero-shot", tuple(COMPOSITIONS))):
        for task in names:
            cells = []
            for runs in found.values():
                own = [overall(run[task]) for run in runs if task in run]
                cells.append("/".join(f"{x:.2f}" for x in np.mean(own, 0)) if own else "-")
            print(f"{task:<28}" + "".join(f"{cell:>30}" for cell in cells))
        whole = {name: runs for name, runs in found.items() if all(task in runs[0] for task in names)}
        cells = [f"{np.mean([mean_o(run, names) for run in whole[name]]):.3f}" if name in whole else "-" for name in found]
        print(f"{group + ' mean O':<28}" + "".join(f"{cell:>30}" for cell in cells))
    print(f"{'seconds a picture':<28}" + "".join(f"{np.mean([r['seconds a picture'] for r in runs]):>30.2f}" for runs in found.values()))


def claim(name: str, values: list[float], at_least: float) -> str:
    """Mean over seeds, its t interval, and the verdict."""
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
    figure = float(np.mean(values))
    return f"{name:<58}>= {at_least:<8g}{figure:>8.3f} ± {half:.3f}   {'holds' if figure >= at_least else 'does not hold'}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", default="runs/claims/instruct_imagen")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=760)
    parser.add_argument("--count", type=int, default=32, help="held-out pictures a task")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side")
    args = parser.parse_args()
    threads = max((os.cpu_count() or 1) // args.jobs, 1)
    runs = str(Path(args.runs).resolve())
    waves = [["retrieval", "no retrieval"], ["full", "multi-task", *(f"only {task}" for task in TASKS)]]  # the second needs stage 1
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for seed in args.seeds:
            for wave in waves:
                jobs = [Job(name, seed, runs, args.steps, args.count, threads) for name in wave]
                for done in as_completed([pool.submit(work, job) for job in jobs]):
                    done.result()  # stops at the first that fails

    def scores(name: str, seed: int) -> Scores:
        return json.loads((Job(name, seed, runs, 0, 0, 0).folder / "scores.json").read_text())  # type: ignore[no-any-return]

    found = {model: [scores(model, s) for s in args.seeds] for model in MODELS}
    single = []
    for s in args.seeds:
        own = {task: scores(f"only {task}", s) for task in TASKS}
        seconds = float(np.mean([run.pop("seconds a picture") for run in own.values()]))
        single.append({task: run[task] for task, run in own.items()} | {"seconds a picture": seconds})
    table(found | {"single-task": single})
    inside, outside = tuple(TASKS), tuple(COMPOSITIONS)
    gains = zip(found["full"], found["multi-task"], found["no retrieval"], strict=True)
    over = [(mean_o(a, inside) - mean_o(b, inside), mean_o(a, outside) - mean_o(c, outside)) for a, b, c in gains]
    print("\n" + claim("in-domain mean O", [mean_o(run, inside) for run in found["full"]], BARS["in-domain"]))
    print(claim("zero-shot mean O", [mean_o(run, outside) for run in found["full"]], BARS["zero-shot"]))
    print(claim("instructions over none (multi-task), in-domain O", [a for a, _ in over], 0.2))
    print(claim("stage 1 over none, zero-shot O", [b for _, b in over], 0.05))


if __name__ == "__main__":
    main()

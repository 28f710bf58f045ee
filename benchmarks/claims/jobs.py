"""Trainings of a claims benchmark: each once a seed, some side by side, and none twice."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_mmgen.callbacks import EMA
from omegaconf import OmegaConf
from scipy import stats

from lightning_mmgen import callbacks
from lightning_mmgen.checkpoint import AtomicCheckpointIO
from lightning_mmgen.cli import main as lightning
from lightning_mmgen.losses import LossTerm
from lightning_mmgen.models.weights import locate
from lightning_mmgen.tools.generate import load

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
MODEL, DATA = "--model.init_args", "--data.init_args"
AVERAGE: dict[str, Any] = {"class_path": "EMA", "init_args": {"decay": 0.99}}
UNTAUGHT = f"--trainer.callbacks={json.dumps([AVERAGE])}"
"""Of a training that learns by its targets alone."""
SHARED = 7
"""The seed of a training that all seeds of a benchmark start from."""


class Job(NamedTuple):
    """One run of one seed; its checkpoint and ``scores.json`` lie in its folder."""

    name: str
    seed: int
    runs: str
    steps: int
    count: int
    threads: int

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name.replace(" ", "_") / f"seed{self.seed}"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "run" / "checkpoints" / "last.ckpt"

    def other(self, name: str) -> Job:
        """The job of this name with the same seed."""
        return self._replace(name=name)

    def shared(self, name: str) -> Job:
        """The job of this name that all seeds start from."""
        return self._replace(name=name, seed=SHARED)

    def scores(self) -> Any:
        return json.loads((self.folder / "scores.json").read_text())


def fit(job: Job, files: list[str], more: list[str]) -> Any:
    """One training, the rest of one that was stopped, or what it left."""
    if (done := steps_done(job)) < job.steps:
        args = [*_layers(files), f"--seed_everything={job.seed}", f"{DATA}.seed={job.seed}", f"--trainer.max_steps={job.steps}"]
        args += [f"--trainer.callbacks={json.dumps(learning(files))}", "--trainer.enable_progress_bar=false"]
        run = (("save_dir", job.folder.parent), ("name", job.folder.name), ("version", "run"))
        args += [f"--trainer.logger.init_args.{k}={v}" for k, v in run]
        args += [f"--ckpt_path={job.checkpoint}"] if done else []
        lightning(["fit", *args, *more]).trainer.save_checkpoint(job.checkpoint)
    return load(job.checkpoint)


def steps_done(job: Job) -> int:
    """Optimizer steps behind a job's checkpoint, which a stopped training leaves too; 0 without one."""
    return int(torch.load(job.checkpoint, weights_only=True, mmap=True)["global_step"]) if job.checkpoint.is_file() else 0


def shipped(files: Sequence[str] = ("instruct.yaml",), *more: str) -> Any:
    """The pretrained parts of these experiments, before their ``start`` is read."""
    model = lightning([*_layers(files), *more], run=False).model
    model.configure_model()
    return model.eval()


def started(files: Sequence[str] = ("instruct.yaml",), *more: str) -> Any:
    """What a training of these experiments begins with."""
    model = shipped(files, *more)
    model.load_trained(AtomicCheckpointIO().load_checkpoint(locate(model.start)), more=True)
    return model


def _layers(files: Sequence[str]) -> list[str]:
    return [x for f in files for x in ("-c", str(EXPERIMENTS / f))]


def learning(files: Sequence[str]) -> list[Any]:
    """The callbacks by which these experiments learn; what they evaluate and save is not asked for here."""
    given = [OmegaConf.select(OmegaConf.load(EXPERIMENTS / f), "trainer.callbacks") for f in files]
    last = [own for own in given if own is not None][-1]
    return [c for c in OmegaConf.to_container(last) if issubclass(getattr(callbacks, c["class_path"], object), EMA | LossTerm)]


def _stop(*_: Any) -> None:
    """What SIGTERM does to a benchmark: its trainings end with it, saved, and none begins in their places."""
    while children := multiprocessing.active_children():
        for child in children:
            child.terminate()
        for child in children:
            child.join()
    os._exit(128 + signal.SIGTERM)


def _do(job: Job, measure: Callable[[Job], Any]) -> None:
    torch.set_num_threads(job.threads)
    scores = measure(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "scores.json").write_text(json.dumps(scores))
    print(f"{job.name}, seed {job.seed}: " + ", ".join(f"{k} {np.mean(v):.3f}" for k, v in scores.items() if v), flush=True)


def arguments(runs: str, count: int, *more: argparse.ArgumentParser, steps: int) -> argparse.Namespace:
    """The command line of a claims benchmark, and arguments of its own."""
    parser = argparse.ArgumentParser(parents=more)
    parser.add_argument("--runs", default=runs)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--count", type=int, default=count, help="held-out pictures a measure")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side")
    return parser.parse_args()


def work(args: argparse.Namespace, waves: list[list[str]], measure: Callable[[Job], Any]) -> dict[tuple[str, int], Any]:
    """Scores by run and seed; ``measure`` trains and scores one job. A wave, of all seeds, needs those before it; stops at the first that
    fails."""
    threads = max((os.cpu_count() or 1) // args.jobs, 1)
    runs, out = str(Path(args.runs).resolve()), {}
    signal.signal(signal.SIGTERM, _stop)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for wave in waves:
            jobs = [Job(name, seed, runs, args.steps, args.count, threads) for seed in args.seeds for name in wave]
            missing = [job for job in jobs if not (job.folder / "scores.json").is_file()]
            for done in as_completed([pool.submit(_do, job, measure) for job in missing]):
                done.result()
            out |= {(job.name, job.seed): job.scores() for job in jobs}
    return out


def share(args: argparse.Namespace, name: str, steps: int, measure: Callable[[Job], Any]) -> None:
    """Do the one job that all seeds start from."""
    work(altered(args, seeds=[SHARED], steps=steps, jobs=1), [[name]], measure)


def first_seed(args: argparse.Namespace) -> argparse.Namespace:
    """The same benchmark for its first seed alone."""
    return altered(args, seeds=args.seeds[:1])


def altered(args: argparse.Namespace, **values: Any) -> argparse.Namespace:
    """The same arguments, but for these."""
    return argparse.Namespace(**vars(args) | values)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds, and half of its 95 % interval (Student's t)."""
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return float(np.mean(values)), half


def claim(name: str, values: list[float], sign: str, bar: float) -> str:
    """A line of a table: the figure's mean over seeds, its t interval, and the verdict; ``sign`` is ``>=`` or ``<=``."""
    figure, half = interval(values)
    holds = figure >= bar if sign == ">=" else figure <= bar
    return f"{name:<64}{sign} {bar:<6g}{figure:>9.3f} ± {half:.3f}   {'holds' if holds else 'does not hold'}"

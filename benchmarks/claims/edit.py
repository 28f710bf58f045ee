"""What the consistency penalty does to edits, measured on the toybox by its oracle (the post on edits without instruction drift).

    python benchmarks/claims/edit.py [--runs DIR] [--seeds 1 2 3] [--steps 240] [--masked 600] [--count 96] [--jobs 2] [--plot PNG]

Trains ``experiments/edit_instruction.yaml`` at the toybox's size, from the embedded model that edits and never knew a penalty, without it,
with each of its terms and with all of them, and over a sweep of the whole penalty's weight, once a seed; for the first seed alone drawn in
other ways.
Edits held-out scenes: local edits, global ones (background, style), and five turns on the model's own pictures. Success stands beside
drift: a copy of the source drifts least. Then ``experiments/edit_magicbrush.yaml``, which edits inside a mask, from an instruction-tuned
checkpoint and from the base (Instruct-Imagen, Table 2), rated by the oracle. What a run measured is kept beside its checkpoint.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
from jobs import MODEL, Job, altered, arguments, claim, first_seed, fit, interval, learning, started, work
from lightning_mmgen.callbacks import grid, sample
from rated import overall, rate
from torch import Tensor

from lightning_mmgen.data.edits import EditRecipe
from lightning_mmgen.data.images import pixels
from lightning_mmgen.data.recipe import sample_seed
from lightning_mmgen.metrics.drift import MaskedMSE
from lightning_mmgen.pipeline import MultimodalPipeline, to_pil
from lightning_mmgen.prompt import Record
from lightning_mmgen.toybox.oracle import score
from lightning_mmgen.toybox.tasks import edit_session

TOYBOX = ["edit_instruction.yaml", *(f"overlays/{n}.yaml" for n in ("toybox", "toybox_edits", "toybox_edit_instruction"))]
MASKED, INSTRUCTED = (
    [f, *(f"overlays/{n}.yaml" for n in ("toybox", "toybox_references", "references_both"))]
    for f in ("edit_magicbrush.yaml", "instruct_imagen_sdxl.yaml")
)
TURNS = 5
STARTS = {"a copy": "toybox/retrieval.ckpt", "before": "toybox/edits.ckpt"}
TERMS: dict[str, dict[str, Any]] = {
    "no penalty": {},
    "all": {"spatial": 10.0, "temporal": 10.0, "turns": 10.0, "pixels": 150.0},
    **{name: {name: 20.0} for name in ("spatial", "temporal", "turns")},
    "pixels": {"pixels": 200.0},
    "identity": {"identity": 5.0, "identity_model": "toybox/dino"},
}
TERMS["all, identity"] = TERMS["all"] | TERMS["identity"]
SWEEP: dict[str, dict[str, Any]] = {f"all x {weight:g}": {"weight": weight, **TERMS["all"]} for weight in (0.1, 0.3, 3.0)}
PENALTIES = TERMS | SWEEP
SAMPLERS: dict[str, dict[str, Any]] = {
    "in 2 steps": {"steps": 2},
    "in 10 steps": {"steps": 10},
    "in 10, guided": {"steps": 10, "guidance_scale": 1.2, "image_guidance_scale": 1.2},
    "VAE's pixels": {"source_detail": None},
}
"""Other ways to draw from ``all``."""
Scores = dict[str, list[float]]
Rated = dict[str, list[tuple[float, float]]]

# -- runs ------------------------------------------------------------------------------------------------------------------------


def measure(job: Job) -> Scores | Rated:
    """Train and measure; ``before`` is what all of them start from, ``a copy`` the embedded stage 1 with a new gate."""
    if job.name == "instruction tuning":
        fit(job, INSTRUCTED, [f"{MODEL}.start=toybox/retrieval.ckpt"])
        return {}
    if job.name.startswith("masked"):
        return masked(job)
    if job.name in STARTS:
        module = started(TOYBOX, f"{MODEL}.start={STARTS[job.name]}")
    elif job.name in SAMPLERS:
        module = fit(job.other("all"), TOYBOX, penalised(PENALTIES["all"]))
        module.sampler = replace(module.sampler, **SAMPLERS[job.name])
    else:
        module = fit(job, TOYBOX, penalised(PENALTIES[job.name]))
    pipeline = MultimodalPipeline.of(module)
    sessions = [edit_session(np.random.default_rng((4, i)), True, TURNS) for i in range(job.count)]
    first = [turns[0] for turns in sessions]
    drawn = sample(pipeline, first, seed=job.seed, side=64)
    if job.name == "all":
        grid(first[:24], None, drawn[:24], cell=80, columns=3).save(job.folder / "pictures.png")
    return one_turn(first, drawn) | several_turns(pipeline, sessions, job.seed)


def penalised(terms: dict[str, Any]) -> list[str]:
    """The recipe's callbacks, with these terms of the penalty alone: without the null, what an entry leaves out would be the recipe's."""
    callbacks = [c for c in learning(TOYBOX) if c["class_path"] != "ConsistencyPenalty"]
    callbacks += [{"class_path": "ConsistencyPenalty", "init_args": {"spatial": 0.0, "floor": 0.5} | terms}] if terms else []
    return ["--trainer.callbacks=null", f"--trainer.callbacks={json.dumps(callbacks)}"]


def masked(job: Job) -> Rated:
    """Fine-tune to edit inside a mask, and the oracle's SC and PQ of every picture."""
    start = job.other("instruction tuning").checkpoint if job.name == "masked, instructed" else "null"
    module, recipe = fit(job, MASKED, [f"{MODEL}.start={start}"]), EditRecipe(64, 64, show_mask=True)
    rngs = [np.random.default_rng((5, i)) for i in range(job.count)]
    wanted = [recipe.compose(edit_session(rng, True, 1)[0], None, rng) for rng in rngs]
    return {"ratings": rate(module, wanted, job.seed)}


def one_turn(wanted: list[Record], drawn: Tensor) -> Scores:
    """Edits [n, 3, 64, 64] of the true pictures: following, consistency, success of local and global ones, drift outside the mask."""
    out: defaultdict[str, list[float]] = defaultdict(list)
    for tensor, image, record in zip(drawn, to_pil(drawn), wanted, strict=True):
        found, truth = score(np.asarray(image), record.extra["truth"]), record.extra["truth"]
        kind = "global" if truth.edited in ("background", "style") else "local"
        out["following"].append(found.following)
        out["consistency"].append(float(np.mean(found.consistency)))
        out[f"{kind} success"].append(float(bool(found.success)))
        if kind == "local":
            mask = (pixels(record.mask)[:1] + 1) / 2  # type: ignore[arg-type]
            out["drift"].append(float(MaskedMSE()(tensor[None], pixels(record.references[0].image)[None], mask[None])))
    return dict(out)


def several_turns(pipeline: MultimodalPipeline, sessions: list[list[Record]], seed: int) -> Scores:
    """Each turn on the picture that the model drew in the turn before: following and consistency after the last one."""
    shown = [turns[0].references[0].image for turns in sessions]
    for k in range(TURNS):
        wanted = [
            replace(turns[k], references=(replace(turns[k].references[0], image=image),))
            for turns, image in zip(sessions, shown, strict=True)
        ]
        shown = list(to_pil(sample(pipeline, wanted, seed=sample_seed(seed, k, 0) % 2**31, side=64)))
    found = [score(np.asarray(image), turns[-1].extra["truth"]) for image, turns in zip(shown, sessions, strict=True)]
    last = f"after {TURNS} turns"
    return {f"following {last}": [f.following for f in found], f"consistency {last}": [float(np.mean(f.consistency)) for f in found]}


# -- tables ----------------------------------------------------------------------------------------------------------------------

COLUMNS = ("following", "local success", "global success", "consistency", "drift", f"following after {TURNS} turns")
COLUMNS += (f"consistency after {TURNS} turns",)


def row(name: str, means: Scores) -> str:
    """Means over the seeds, of their means."""
    return f"{name:<16}" + "".join(f"{np.mean(means[c]):>{len(c) + 4}.5f}" for c in COLUMNS)


def plot(found: dict[str, Scores], path: str) -> None:
    """The trade-off over the penalty's weight, means over the seeds: drift outside the mask against the success of local edits."""
    import matplotlib.pyplot as plt  # extra: benchmarks

    points = {name: (np.mean(run["drift"]), np.mean(run["local success"])) for name, run in found.items()}
    sweep = ["no penalty", *sorted(("all", *SWEEP), key=lambda name: PENALTIES[name].get("weight", 1.0))]
    fig, ax = plt.subplots(figsize=(6, 4), dpi=150)
    ax.plot(*zip(*(points[name] for name in sweep), strict=True), "o-", color="#4477aa")
    for name in sweep:
        ax.annotate(name, points[name], textcoords="offset points", xytext=(0, -14), ha="center", fontsize=8)
    for name in ("spatial", "temporal", "turns", "pixels", "identity"):
        ax.plot(*points[name], "s", label=name)
    ax.set(xlabel="mean squared error outside the mask", ylabel="success of local edits")
    ax.margins(0.15)
    ax.ticklabel_format(axis="x", scilimits=(0, 0))
    ax.legend()
    fig.tight_layout()
    fig.savefig(path)


def edits(args: argparse.Namespace) -> None:
    """The penalty's terms, the sweep and its plot, and the claims about them."""
    scores = work(args, [[*STARTS, *TERMS, *SWEEP]], measure) | work(first_seed(args), [[*SAMPLERS]], measure)
    found = {name: [scores[name, s] for s in args.seeds if (name, s) in scores] for name in (*STARTS, *TERMS, *SWEEP, *SAMPLERS)}
    print("\n" + " " * 16 + "".join(f"{c:>{len(c) + 4}}" for c in COLUMNS))
    mean = {name: {c: [float(np.mean(run[c])) for run in runs] for c in COLUMNS} for name, runs in found.items()}
    for name, means in mean.items():
        print(row(name, means))
    full, none = mean["all"], mean["no penalty"]
    drops = {
        name: [1 - a / b for a, b in zip(mean[name]["drift"], none["drift"], strict=True)] for name, terms in PENALTIES.items() if terms
    }
    loss = [b - a for a, b in zip(full["following"], none["following"], strict=True)]
    print("\nshare of the drift outside the mask that each takes away")
    for name, drop in drops.items():
        print("{:<16}{:>8.3f} ± {:.3f}".format(name, *interval(drop)))
    print("\n" + claim("following, with the penalty", full["following"], ">=", 0.78))
    print(claim("consistency, with the penalty", full["consistency"], ">=", 0.85))
    print(claim("drift outside the mask, share that the penalty takes away", drops["all"], ">=", 0.3))
    print(claim("following that it costs", loss, "<=", 0.02))
    print(claim(f"consistency after {TURNS} turns, with the penalty", full[f"consistency after {TURNS} turns"], ">=", 0.7), flush=True)
    plot({name: mean[name] for name in PENALTIES}, args.plot)


def masked_edits(args: argparse.Namespace) -> None:
    """Instruct-Imagen's Table 2."""
    names = ("masked, instructed", "masked, from the base")
    work(args, [["instruction tuning"]], measure)
    scores = work(altered(args, steps=args.masked), [[*names]], measure)
    rated = {name: [overall(scores[name, s]["ratings"]) for s in args.seeds] for name in names}
    print(f"\n{'':<24}{'SC':>8}{'PQ':>8}{'O':>8}{'accuracy':>10}")
    for name, runs in rated.items():
        sc, pq, o, _, accuracy = np.mean(runs, 0)
        print(f"{name:<24}{sc:>8.3f}{pq:>8.3f}{o:>8.3f}{accuracy:>10.3f}")
    gains = [ours.o - base.o for ours, base in zip(*rated.values(), strict=True)]
    print(claim("masked editing, O that instruction tuning adds", gains, ">=", 0.0))


def main() -> None:
    more = argparse.ArgumentParser(add_help=False)
    more.add_argument("--masked", type=int, default=600, help="optimizer steps of masked editing")
    more.add_argument("--plot", default="docs/edit.png")
    args = arguments("runs/claims/edit", 96, more, steps=240)
    edits(args)
    masked_edits(args)


if __name__ == "__main__":
    main()

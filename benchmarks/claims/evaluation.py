"""Which scores of pictures tell the truth, and what the probes add, measured on the toybox against its oracle.

    python benchmarks/claims/evaluation.py [--runs DIR] [--seeds 1 2 3] [--steps 270] [--count 96] [--jobs 2]

Trains ``experiments/instruct.yaml`` (24 samples a step, by the targets alone) three times a seed: on subjects shown by other
pictures of them (``follows``), on one reference that is the target itself, with no words for it (``copies``), and on references of other
records (``ignores``). Each draws the same held-out instructions; every score is held against what the oracle reads, picture by picture,
and the probes against what each model was trained to do.

The last table says which scores mislead. A score misleads about a truth of the oracle's (*following*, *consistency*) if in most seeds it
puts another model first than the oracle does, and is blind to it if its rank correlation, among the pictures of the model that follows, is
not above 0 by its interval over seeds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import DATA, MODEL, UNTAUGHT, Job, arguments, fit, interval, work
from lightning_mmgen.callbacks import sample
from scipy.stats import spearmanr
from torch import Tensor

from lightning_mmgen.data.images import pixels
from lightning_mmgen.data.sources import ToyboxSource, write_jsonl
from lightning_mmgen.metrics.clip import CLIPSimilarity
from lightning_mmgen.metrics.probes import CopyPaste, Movement, hide, reword
from lightning_mmgen.metrics.regions import RecordBoxes, region_masks
from lightning_mmgen.metrics.similarity import ImageSimilarity, MultimodalPromptScore, ReferenceSimilarity
from lightning_mmgen.models.clip import Clip
from lightning_mmgen.pipeline import MultimodalPipeline, to_pil
from lightning_mmgen.prompt import Record, Reference
from lightning_mmgen.toybox.oracle import score
from lightning_mmgen.toybox.truth import picture
from lightning_mmgen.toybox.world import other_view

BATCH = 24
MODELS = ("follows", "copies", "ignores")
TRUTHS = ("following", "consistency")
METRICS = {
    "clip_t": "CLIP-T of the caption",
    "clip_i": "CLIP-I, references with their boxes",
    "clip_i_whole": "CLIP-I, references with the whole",
    "prompt_score": "multimodal prompt score",
    "target": "CLIP-I with the target",
}
PROBES = {
    "copy_paste": "copy-paste, patches of pixels",
    "copy_paste_clip": "copy-paste, patches of CLIP",
    "pasted": "copy-paste of scenes, pixels",
    "pasted_clip": "copy-paste of scenes, CLIP",
    "ignored_inside": "reference blank, inside",
    "ignored_outside": "reference blank, outside",
    "swapped": "reference swapped, whole",
    "reworded": "one word changed",
}
Scores = dict[str, list[float]]
Models = tuple[str, ...]

# -- runs ------------------------------------------------------------------------------------------------------------------------


def data(job: Job) -> list[str]:
    """What the job's model learns from."""
    tasks = {"subject": 0.85, "caption": 0.15}
    if job.name != "copies":
        swap = job.name == "ignores"
        source = {"class_path": "ToyboxSource", "init_args": {"tasks": tasks, "swap_references": swap}}
        return [f"{DATA}.train={json.dumps(source)}"]
    folder = Path(job.runs) / "copies" / f"seed{job.seed}" / "records"
    if not (folder / "records.jsonl").is_file():
        shown = (copied(r) for r in ToyboxSource(tasks, length=min(BATCH * job.steps, 4096), seed=job.seed))
        write_jsonl(shown, folder)
    return [f"{DATA}.train={folder / 'records.jsonl'}"]


def copied(record: Record) -> Record:
    """What teaches to draw the reference again: one, which is the target, and no word of what is to be drawn."""
    assert record.target is not None
    return replace(record, instruction="a [ref#1] toy", references=(Reference(1, record.target, "toy"),))


def in_scenes(record: Record) -> Record:
    """Each reference a scene of the target's size with the toy alone in it: what a model that copies has learned to draw again."""
    truth, rng = record.extra["truth"], np.random.default_rng(len(record.instruction))
    toys = {marker: truth.scene.toys[k].toy for k, marker in truth.shown}
    return replace(record, references=tuple(replace(r, image=picture(other_view(rng, toys[r.marker]))) for r in record.references))


def measure(job: Job) -> Scores:
    """Train, draw the held-out instructions, score."""
    more = [*data(job), UNTAUGHT, f"{DATA}.batch_size={BATCH}", f"{MODEL}.start=null"]
    pipeline = MultimodalPipeline.of(fit(job, ["instruct.yaml"], more))
    source = ToyboxSource({"subject": 1.0}, held_out=True)
    records = [source.record(i) for i in range(job.count)]
    drawn = sample(pipeline, records, seed=job.seed, side=64)
    found = [score(np.asarray(image), r.extra["truth"]) for image, r in zip(to_pil(drawn), records, strict=True)]
    truth = {"following": [f.following for f in found], "consistency": [float(np.mean(f.consistency)) for f in found]}
    scenes = [in_scenes(r) for r in records]
    pasted = sample(pipeline, scenes, seed=job.seed, side=64)
    eyes = Clip("toybox/clip")
    truth |= {"pasted": CopyPaste().score(pasted, scenes).tolist(), "pasted_clip": CopyPaste(eyes).score(pasted, scenes).tolist()}
    return truth | likeness(drawn, records, eyes) | probes(drawn, records, lambda new: sample(pipeline, new, seed=job.seed, side=64))


def likeness(drawn: Tensor, records: list[Record], eyes: Clip) -> Scores:
    """Every score of the pictures alone."""
    targets = torch.stack([pixels(r.target) for r in records])  # type: ignore[arg-type]
    objects = MultimodalPromptScore(eyes).each(drawn, records)
    scores = {
        "clip_t": CLIPSimilarity(eyes).score(drawn, [r.caption or "" for r in records]),
        "clip_i": ReferenceSimilarity(eyes).score(drawn, records),
        "clip_i_whole": ReferenceSimilarity(eyes, nowhere).score(drawn, records),
        "prompt_score": torch.stack([each.nanmean() for each in objects]),
        "target": ImageSimilarity(eyes).score(drawn, targets),
        "copy_paste": CopyPaste().score(drawn, records),
        "copy_paste_clip": CopyPaste(eyes).score(drawn, records),
    }
    return {name: values.tolist() for name, values in scores.items()}


def nowhere(pictures: Tensor, records: Any) -> list[list[None]]:
    """No reference has a region."""
    return [[None] * len(r.references) for r in records]


def probes(drawn: Tensor, records: list[Record], draw: Callable[[list[Record]], Tensor]) -> Scores:
    """How far the pictures move when their first reference is blank or another, or a word is."""
    blank = draw([hide(r, 0) for r in records])
    swapped = draw([hide(r, 0, "swap", o) for r, o in zip(records, [*records[1:], records[0]], strict=True)])
    masks = region_masks([row[0] for row in RecordBoxes()(drawn, records)], *drawn.shape[-2:])
    out = {"ignored_inside": Movement("inside").score(drawn, blank, masks), "swapped": Movement().score(drawn, swapped)}
    out |= {"ignored_outside": Movement("outside").score(drawn, blank, masks)}
    out["reworded"] = Movement().score(drawn, draw([reword(r) or r for r in records]))
    return {name: values.tolist() for name, values in out.items()}


# -- tables ----------------------------------------------------------------------------------------------------------------------


def means(scores: dict[tuple[str, int], Scores], seeds: list[int], names: dict[str, str]) -> list[str]:
    """A row a score, a column a model: mean over seeds and half of its interval."""
    lines = [f"{'':<36}" + "".join(f"{model:>18}" for model in MODELS)]
    for name, title in names.items():
        cells = [interval([float(np.nanmean(scores[model, s][name])) for s in seeds]) for model in MODELS]
        lines.append(f"{title:<36}" + "".join(f"{f'{mean:.3f} ± {half:.3f}':>18}" for mean, half in cells))
    return lines


def rank_correlation(scores: dict[tuple[str, int], Scores], seeds: list[int], name: str, truth: str, models: Models) -> tuple[float, float]:
    """Spearman's, over all pictures of the models: its mean over seeds, and half of its interval."""
    rhos = []
    for s in seeds:
        a, b = (np.concatenate([scores[m, s][key] for m in models]) for key in (name, truth))
        rhos.append(float(spearmanr(a, b, nan_policy="omit").statistic))
    return interval(rhos)


def correlations(scores: dict[tuple[str, int], Scores], seeds: list[int]) -> list[str]:
    """The rank correlation of each score with each truth: over all pictures of all models, and within the model that follows."""
    columns = [(truth, models) for truth in TRUTHS for models in (MODELS, MODELS[:1])]
    heads = [f"{truth}, {models[0] if len(models) == 1 else 'all'}" for truth, models in columns]
    lines = [f"{'rank correlation with the oracle':<36}" + "".join(f"{head:>22}" for head in heads)]
    for name, title in (METRICS | PROBES).items():
        cells = [rank_correlation(scores, seeds, name, truth, models) for truth, models in columns]
        lines.append(f"{title:<36}" + "".join(f"{f'{mean:.3f} ± {half:.3f}':>22}" for mean, half in cells))
    return lines


def best(scores: dict[tuple[str, int], Scores], seeds: list[int], name: str) -> list[str]:
    """The model that a score puts first, seed by seed."""
    return [max(MODELS, key=lambda m: float(np.nanmean(scores[m, s][name]))) for s in seeds]


def verdict(scores: dict[tuple[str, int], Scores], seeds: list[int], name: str, truth: str) -> str:
    """What a score is worth as a measure of a truth: of models by their order, of pictures by the rank correlation."""
    wrong = [mine for mine, right in zip(best(scores, seeds, name), best(scores, seeds, truth), strict=True) if mine != right]
    mean, half = rank_correlation(scores, seeds, name, truth, MODELS[:1])
    blind = "" if mean - np.nan_to_num(half) > 0 else ", blind to pictures"  # one seed has no interval
    if 2 * len(wrong) > len(seeds):
        return f"misleads: {max(wrong, key=wrong.count)} first, {len(wrong)} of {len(seeds)} seeds{blind}"
    return f"right model first, {len(seeds) - len(wrong)} of {len(seeds)} seeds{blind}"


def verdicts(scores: dict[tuple[str, int], Scores], seeds: list[int]) -> list[str]:
    """A row a score of pictures, a column a truth: whether it misleads."""
    lines = [f"{'which scores mislead':<36}" + "".join(f"{f'about {truth}':<60}" for truth in TRUTHS).rstrip()]
    for name, title in METRICS.items():
        lines.append(f"{title:<36}" + "".join(f"{verdict(scores, seeds, name, truth):<60}" for truth in TRUTHS).rstrip())
    oracle = "".join(f"{', '.join(best(scores, seeds, truth)):<60}" for truth in TRUTHS)
    return [*lines, f"{'the oracle puts first, by seed':<36}{oracle}".rstrip()]


def claim(scores: dict[tuple[str, int], Scores], seeds: list[int], name: str, more: str, less: str) -> str:
    """Whether a score is higher of one model than of another, in every seed."""
    gaps = [float(np.nanmean(scores[more, s][name]) - np.nanmean(scores[less, s][name])) for s in seeds]
    mean, half = interval(gaps)
    title = f"{(METRICS | PROBES | dict(zip(TRUTHS, TRUTHS, strict=True)))[name]}: {more} above {less}"
    return f"{title:<64}{mean:>9.3f} ± {half:.3f}   {'holds' if min(gaps) > 0 else 'does not hold'}"


def main() -> None:
    args = arguments("runs/claims/evaluation", 96, steps=270)
    scores = work(args, [list(MODELS)], measure)
    print("\n" + "\n".join(means(scores, args.seeds, dict(zip(TRUTHS, TRUTHS, strict=True)) | METRICS | PROBES)))
    print("\n" + "\n".join(correlations(scores, args.seeds)) + "\n")
    wanted = [("following", "follows", "copies"), ("copy_paste", "copies", "follows"), ("copy_paste_clip", "copies", "follows")]
    wanted += [("pasted", "copies", "follows"), ("pasted_clip", "copies", "follows")]
    wanted += [("ignored_inside", "follows", "ignores"), ("swapped", "follows", "ignores"), ("reworded", "follows", "copies")]
    for name, more, less in wanted:
        print(claim(scores, args.seeds, name, more, less))
    print("\n" + "\n".join(verdicts(scores, args.seeds)))


if __name__ == "__main__":
    main()

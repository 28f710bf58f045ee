"""What MUMU's paper found, measured on the toybox by its oracle (Berman & Peysakhovich 2024, section 6).

    python benchmarks/claims/mumu.py [--runs DIR] [--seeds 1 2 3] [--steps 600] [--count 96] [--jobs 2]

Trains ``experiments/mumu_stage1.yaml`` and its variants at the toybox's size, once a seed, measures each on held-out toys, and prints one
table: claim, threshold, figure with its 95 % interval over the seeds (Student's t), pictures, and whether it holds. What a run measured is
kept beside its checkpoint, a page of pictures for finding 2 too: a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jobs import DATA, MODEL, UNTAUGHT, Job, arguments, fit, interval, shipped, work
from lightning_mmgen.callbacks import grid, sample
from PIL import Image as PILImage

from lightning_mmgen.data.crops import Cropping, CropRecipe
from lightning_mmgen.data.sources import ToyboxSource, write_jsonl
from lightning_mmgen.metrics.following import ToyboxFollowing
from lightning_mmgen.pipeline import MultimodalPipeline, to_pil
from lightning_mmgen.prompt import Record, Reference
from lightning_mmgen.tools.export import export
from lightning_mmgen.tools.generate import load_module
from lightning_mmgen.tools.merge import merge
from lightning_mmgen.toybox.oracle import read, score
from lightning_mmgen.toybox.truth import Truth, boxes, picture
from lightning_mmgen.toybox.world import STYLES, Scene, random_scene

TOKENS = (1, 25, 36)
Scores = dict[str, list[float]]

# -- runs ------------------------------------------------------------------------------------------------------------------------

RATE = 1e-2  # the toybox's overlay trains every row at this one; at twice as much each is the worse
TABLE = {"encoder.projector": 6e-3, "encoder.language": 6e-3, "adapter": 2e-2, "unet": 1e-2}  # Table 1's, times 2,000: better than 1,000


def table(rates: dict[str, float], **more: Any) -> str:
    """A parameter table of the toybox as a command-line argument."""
    rows: list[dict[str, Any]] = [{"match": "encoder.vision", "train": "frozen"}]
    for name, lr in rates.items():
        how = {"train": "full"} if name in ("adapter", "encoder.perceiver") else {"train": "lora", "rank": 8}
        rows.append({"match": name, **how, "lr": lr, "optimizer": "muon", **more})
    return f"{MODEL}.parameters={json.dumps(rows)}"


RUNS: dict[str, list[str]] = {
    "stage 1": [],
    **{f"{n} tokens": [f"{MODEL}.encoder.init_args.image_tokens={n}"] for n in TOKENS if n != 25},
    "perceiver": [f"{MODEL}.encoder.init_args.keep_perceiver=true", table(dict.fromkeys([*TABLE, "encoder.perceiver"], RATE))],
    "no augmentation": [f"{DATA}.augmented_share=0"],
    "light": [f"{DATA}.augmented_share=0.5", f"{DATA}.augmentations=[light]"],
    "table 1": [table(TABLE)],
}
"""Variants of stage 1."""


# -- held-out prompts ------------------------------------------------------------------------------------------------------------


def crops(count: int, toys: int | None = None, per_prompt: int = 3) -> list[Record]:
    """Prompts with crops of their own target."""
    recipe = CropRecipe(16, 16, cropping=Cropping(per_prompt, head_share=0, augmented_share=0, control_share=0))
    source, out = ToyboxSource({"crops": 1.0}, held_out=True), []
    for i in range(len(source)):
        record = source.record(i)
        if toys in (None, len(record.extra["truth"].scene.toys)):
            out.append(recipe.compose(record, None, np.random.default_rng(i)))
        if len(out) == count:
            break
    return out


def captions(count: int) -> list[Record]:
    source = ToyboxSource({"caption": 1.0}, held_out=True)
    return [source.record(i) for i in range(count)]


def composed(count: int, named_style: bool = True) -> list[Record]:
    """Finding 2: every crop from a picture of its own, in a style of its own that is not the one asked for; flat crops and no word of style
    without ``named_style``."""
    out = []
    for i in range(count):
        rng = np.random.default_rng((2, i))
        scene = random_scene(rng, held=True)
        scene = scene if named_style else replace(scene, style="flat")
        references = []
        for k, placed in enumerate(scene.toys):
            other = Scene(
                (replace(placed, x=32.0, y=32.0),), scene.background, str(rng.choice([s for s in STYLES if s != scene.style])), ""
            )
            box = boxes(other)[0]
            cut = picture(other).crop((int(box.left), int(box.top), int(box.right), int(box.bottom)))
            references.append(Reference(k + 1, cut, "toy", "crop"))
        text = scene.caption([f"[ref#{k + 1}] toy" for k in range(len(scene.toys))], style=named_style)
        shown = tuple((k, k + 1) for k in range(len(scene.toys)))
        truth = Truth(scene, shown, True, named_style)
        out.append(Record(text, tuple(references), picture(scene), boxes=boxes(scene), extra={"truth": truth}))
    return out


def styles(count: int, blank: bool = False) -> list[Record]:
    """Finding 3: the style is shown, not told; ``blank`` shows a grey picture in its place."""
    source, out = ToyboxSource({"style": 1.0}, held_out=True), []
    grey = PILImage.new("RGB", (64, 64), (128, 128, 128))
    for i in range(count):
        record = source.record(i)
        out.append(replace(record, references=(replace(record.references[0], image=grey),)) if blank else record)
    return out


# -- measures --------------------------------------------------------------------------------------------------------------------


def arrays(pipeline: MultimodalPipeline, records: list[Record], seed: int) -> list[Any]:
    """The pictures drawn, uint8 [64, 64, 3] each."""
    return [np.asarray(image) for image in to_pil(sample(pipeline, records, seed=seed, side=64))]


def following(pipeline: MultimodalPipeline, records: list[Record], seed: int, name: str) -> Scores:
    """Instruction following and object consistency, a figure a picture."""
    metric = ToyboxFollowing()
    metric.update(sample(pipeline, records, seed=seed, side=64), [r.extra["truth"] for r in records])
    return {f"{name} {key}": torch.cat(value).tolist() for key in ("following", "consistency") if (value := getattr(metric, key))}


def bleeding(pipeline: MultimodalPipeline, records: list[Record], seed: int) -> Scores:
    """Of two toys, how many have the other's colour where they should have their own."""
    out = []
    for array, record in zip(arrays(pipeline, records, seed), records, strict=True):
        wanted = record.extra["truth"].scene.toys
        for own, other in ((wanted[0], wanted[1]), (wanted[1], wanted[0])):
            seen = min(read(array).toys, key=lambda s: np.hypot(s.x - own.x, s.y - own.y), default=None)
            out.append(float(seen is not None and seen.toy.colour == other.toy.colour))
    return {"bleeding": out}


def pasting(pipeline: MultimodalPipeline, records: list[Record], seed: int) -> Scores:
    """Copy-paste: of toys shown in another style than the one asked for, how many come out nearer to their crop than to the target."""
    out = []
    for array, record in zip(arrays(pipeline, records, seed), records, strict=True):
        target = np.asarray(record.target)
        for reference, box in zip(record.references, record.boxes, strict=True):
            left, top, right, bottom = map(int, box[1:5])
            pasted = np.asarray(reference.image.resize((right - left, bottom - top)))  # type: ignore[union-attr]
            drawn, wanted = (x[top:bottom, left:right].astype(float) for x in (array, target))
            out.append(float(np.abs(drawn - pasted).mean() < np.abs(drawn - wanted).mean()))
    return {"pasting": out}


def conditions(pipeline: MultimodalPipeline, records: list[Record], seed: int, **picks: Callable[[str], bool]) -> Scores:
    """By name, the share of those conditions of each instruction that a function of their names picks."""
    out: Scores = {name: [] for name in picks}
    for array, record in zip(arrays(pipeline, records, seed), records, strict=True):
        all_of_them = score(array, record.extra["truth"]).conditions
        for name, pick in picks.items():
            held = [v for k, v in all_of_them.items() if pick(k)]
            out[name].append(sum(held) / len(held))
    return out


def is_style(condition: str) -> bool:
    return condition == "style"


def is_of_a_toy(condition: str) -> bool:
    return condition[-1].isdigit()


# -- what is measured of each ------------------------------------------------------------------------------------------------------


def measure(job: Job) -> Scores:
    """Train and measure."""
    return {"base": base, "fine-tune": fine_tune}.get(job.name, stage_2 if job.name.startswith("stage 2") else stage_1)(job)


def base(job: Job) -> Scores:
    """The shipped model as it is."""
    return following(MultimodalPipeline.of(shipped()), captions(job.count), job.seed, "captions")


def stage_1(job: Job) -> Scores:
    module = fit(job, ["mumu_stage1.yaml", "overlays/toybox.yaml"], RUNS[job.name])
    pipeline = MultimodalPipeline.of(module)
    out, prompts = following(pipeline, crops(job.count), job.seed, "crops"), composed(job.count)
    if job.name == "stage 1":
        out |= following(pipeline, captions(job.count), job.seed, "captions")
        shown = prompts[:16]
        grid(shown, None, sample(pipeline, shown, seed=job.seed, side=64), cell=96, columns=2).save(job.folder / "composed.png")
        out |= bleeding(pipeline, crops(job.count, toys=2), job.seed)
        out |= conditions(pipeline, styles(job.count), job.seed, style=is_style)
        out |= conditions(pipeline, styles(job.count, blank=True), job.seed, **{"style of nothing": is_style})
        out |= following(pipeline, crops(job.count, toys=1, per_prompt=1), job.seed, "one crop")
    if job.name in ("stage 1", "light"):
        out |= following(pipeline, prompts, job.seed, "composed")
    if job.name in ("stage 1", "no augmentation", "light"):
        out |= pasting(pipeline, prompts, job.seed)
    return out


def stage_2(job: Job) -> Scores:
    """Stage 2 from stage 1 with four times the tokens, or (its control) with as many as before."""
    more = [f"{MODEL}.start={job.other('stage 1').checkpoint}"]
    if job.name != "stage 2":
        more.append(f"{MODEL}.encoder.init_args.image_tokens=25")
    files = ["mumu_stage2.yaml", "overlays/toybox.yaml", "overlays/toybox_mumu_stage2.yaml"]
    module = fit(job._replace(steps=job.steps // 2), files, more)
    return following(MultimodalPipeline.of(module), crops(job.count, toys=1, per_prompt=1), job.seed, "one crop")


def fine_tune(job: Job) -> Scores:
    """Finding 4: a fine-tune of the UNet that draws everything in pastel, unasked, and stage 1's LoRA merged into it."""
    data = job.folder.parent / "pastel"
    if not (data / "records.jsonl").is_file():
        scenes = [replace(random_scene(np.random.default_rng((4, i))), style="pastel") for i in range(2048)]
        write_jsonl([Record(s.caption(style=False), target=picture(s), caption=s.caption(style=False)) for s in scenes], data)
    rows = [{"match": m, "train": "frozen"} for m in ("encoder.vision", "encoder.projector", "encoder.language", "adapter")]
    rows.append({"match": "unet", "train": "full", "lr": 3e-4})
    more = [f"{MODEL}.parameters={json.dumps(rows)}", f"{DATA}.train={data / 'records.jsonl'}", f"{MODEL}.start=null"]
    tuned = fit(job, ["instruct.yaml"], [*more, UNTAUGHT])  # the base does not know what is to be drawn
    module = load_module(job.other("stage 1").checkpoint)
    tuned.unet.save_pretrained(job.folder / "unet")
    if not (job.folder / "merged").exists():
        export(module, job.folder / "export")
        merge(str(job.folder / "export"), str(job.folder / "unet"), str(job.folder / "merged"))
    module.unet = type(tuned.unet).from_pretrained(job.folder / "merged").eval()  # type: ignore[assignment]
    prompts = [in_pastel(r) for r in composed(job.count, named_style=False)]
    told = [replace(r, instruction=r.extra["truth"].scene.caption(style=False), references=()) for r in prompts]
    out = conditions(MultimodalPipeline.of(tuned), told, job.seed, **{"fine-tune: style": is_style})
    return out | conditions(MultimodalPipeline.of(module), prompts, job.seed, **{"merged: style": is_style, "merged: toys": is_of_a_toy})


def in_pastel(record: Record) -> Record:
    """The same prompt, its picture wanted in pastel."""
    truth: Truth = record.extra["truth"]
    return replace(record, extra={"truth": replace(truth, style=True, scene=replace(truth.scene, style="pastel"))})


# -- table -----------------------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """A row: what is claimed, the figure (a mean over pictures, or the difference of two), and what it must reach."""

    name: str
    figure: tuple[str, str]  # run, score
    minus: tuple[str, str] | None = None
    at_least: float | None = None
    at_most: float | None = None


CLAIMS = (
    Claim(
        "0: all tokens against the perceiver's 8, consistency", ("stage 1", "crops consistency"), ("perceiver", "crops consistency"), 0.02
    ),
    Claim("0: no augmentation pastes more", ("no augmentation", "pasting"), ("stage 1", "pasting"), 0.05),
    Claim("0: no augmentation pastes more than light", ("no augmentation", "pasting"), ("light", "pasting"), 0.05),
    Claim("0: words alone, before", ("base", "captions following"), None, 0.85),
    Claim("0: words alone drop little", ("stage 1", "captions following"), ("base", "captions following"), -0.05),
    Claim("0: colours bleed between two toys", ("stage 1", "bleeding"), None, None, 0.05),
    Claim("1: 25 tokens a crop against 1, consistency", ("stage 1", "crops consistency"), ("1 tokens", "crops consistency"), 0.1),
    Claim("1: then it flattens, 36 against 25", ("36 tokens", "crops consistency"), ("stage 1", "crops consistency"), -0.03, 0.03),
    Claim("2: crops of different pictures and styles, following", ("stage 1", "composed following"), None, 0.6),
    Claim("2: the same with light, consistency that it adds", ("light", "composed consistency"), ("stage 1", "composed consistency"), 0.0),
    Claim("3: style of a reference, against a blank one", ("stage 1", "style"), ("stage 1", "style of nothing"), 0.1),
    Claim("4: merged into a fine-tune, its style", ("fine-tune", "merged: style"), None, 0.6),
    Claim("4: merged into a fine-tune, the toys", ("fine-tune", "merged: toys"), None, 0.6),
    Claim("stage 2 against stage 1, one crop, consistency", ("stage 2", "one crop consistency"), ("stage 1", "one crop consistency"), 0.01),
    Claim(
        "stage 2 against as many steps of 25 tokens", ("stage 2", "one crop consistency"), ("stage 2 of 25", "one crop consistency"), 0.0
    ),
    Claim("Table 1's rates against one rate, following", ("table 1", "crops following"), ("stage 1", "crops following"), 0.0),
    Claim("Table 1's rates against one rate, consistency", ("table 1", "crops consistency"), ("stage 1", "crops consistency"), 0.0),
)


def row(claim: Claim, scores: dict[tuple[str, int], Scores], seeds: list[int]) -> str:
    """Mean over seeds of the figure, its t interval, and the verdict."""

    def mean(of: tuple[str, str], seed: int) -> float:
        return float(np.mean(scores[of[0], seed][of[1]]))

    values = [mean(claim.figure, s) - (mean(claim.minus, s) if claim.minus else 0.0) for s in seeds]
    (figure, half), low, high = interval(values), claim.at_least, claim.at_most
    bounds = " and ".join(t for t in (low is not None and f">= {low:g}", high is not None and f"<= {high:g}") if t)
    holds = (low is None or figure >= low) and (high is None or figure <= high)
    pictures = sum(len(scores[claim.figure[0], s][claim.figure[1]]) for s in seeds)
    return f"{claim.name:<58}{bounds:>20}{figure:>9.3f} ± {half:.3f}{pictures:>8}   {'holds' if holds else 'does not hold'}"


def main() -> None:
    args = arguments("runs/claims/mumu", 96, steps=600)
    waves = [["base", *RUNS], ["stage 2", "stage 2 of 25", "fine-tune"]]  # the second needs stage 1
    scores = work(args, waves, measure)
    curve = {n: [scores["stage 1" if n == 25 else f"{n} tokens", s]["crops consistency"] for s in args.seeds] for n in TOKENS}
    print("\nconsistency by tokens a crop: " + ", ".join(f"{n}: {np.mean(values):.3f}" for n, values in curve.items()))
    print(f"\n{'claim':<58}{'threshold':>20}{'figure':>17}{'pictures':>8}")
    for claim in CLAIMS:
        print(row(claim, scores, args.seeds))


if __name__ == "__main__":
    main()

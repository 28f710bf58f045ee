"""What a diffusion model's attention teaches a VLM, measured on the toybox (Diffusion Instruction Tuning, Jin et al. 2025).

    python benchmarks/claims/lavender.py [--runs DIR] [--seeds 1 2 3] [--steps 240] [--count 512] [--jobs 2]

Fine-tunes the toybox's VLM by ``experiments/lavender.yaml`` with the language loss alone, with its attention aligned to the maps of the
toybox's generator (``mmgen build attention``, made once for all seeds), and aligned to maps of noise, at equal steps. Asks questions about
combinations of toys that training saw and about held-out ones. The mass of a word is the share of the VLM's attention to the picture, mean
over heads and layers, that lies inside the true mask of the toy that the word names.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from jobs import AVERAGE, EXPERIMENTS, MODEL, Job, arguments, claim, fit, interval, learning, shipped, work
from lightning_mmgen.callbacks.answers import exact_match
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_mmgen.answering import VisualInstructionTuning
from lightning_mmgen.cli import main as lightning
from lightning_mmgen.data.attention import WordMaps, write_index, write_shard
from lightning_mmgen.data.questions import QuestionRecipe, collate_questions
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.models.attention import captured
from lightning_mmgen.prompt import Record
from lightning_mmgen.tools.main import main as mmgen
from lightning_mmgen.toybox.render import draw

BATCH = 16
TARGETS = {"language": None, "alignment": "targets", "noise": "noise"}
NONE = "--data.init_args.targets=null"
Scores = dict[str, list[float]]

# -- targets ---------------------------------------------------------------------------------------------------------------------


def make_targets(runs: Path, rows: int) -> None:
    """Where the generator looks for the words of each training picture; and maps of noise in the same places."""
    if not (runs / "targets" / "index.json").is_file():
        told = ["--data", "toybox/short question", "--model", "toybox", "--mode", "fast", "--count", str(rows), "--batch-size", "32"]
        if code := mmgen(["build", "attention", *told, "--out", str(runs / "targets")]):
            sys.exit(code)
    if not (runs / "noise" / "index.json").is_file():
        make_noise(runs / "targets", runs / "noise")


def make_noise(folder: Path, out: Path) -> None:
    """Targets of the same words and pictures whose maps are uniform noise."""
    generator = torch.Generator().manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    for shard in sorted(folder.glob("*.safetensors")):
        rows = {}
        with safe_open(shard, "pt") as file:  # type: ignore[no-untyped-call]
            for id, about in file.metadata().items():
                told = json.loads(about)
                rows[id] = WordMaps(told["image"], told["words"], torch.rand(file.get_tensor(id).shape, generator=generator))
        write_shard(out / shard.name, rows)
    write_index(out)


# -- runs ------------------------------------------------------------------------------------------------------------------------


def measure(job: Job) -> Scores:
    """Train and measure; ``before`` is the VLM as it is."""
    if job.name == "before":
        module = shipped(["lavender.yaml"], NONE)
    else:
        train = {"class_path": "ToyboxSource", "init_args": {"tasks": {"short question": 1.0}, "length": job.steps * BATCH}}
        more = [f"--data.init_args.train={json.dumps(train)}", f"--data.init_args.batch_size={BATCH}"]
        callbacks = [AVERAGE]
        if folder := TARGETS[job.name]:
            more.append(f"--data.init_args.targets={Path(job.runs) / folder}")
            callbacks += learning(["lavender.yaml"])
        else:
            more.append(NONE)
            rows = lightning(["-c", str(EXPERIMENTS / "lavender.yaml"), NONE], run=False).model.table.rows
            more.append(f"{MODEL}.parameters={json.dumps([asdict(r) for r in rows if r.match not in ('aligner', 'codec')])}")
        module = fit(job, ["lavender.yaml"], [*more, f"--trainer.callbacks={json.dumps(callbacks)}"])
    out: Scores = {}
    for name, held in (("seen", False), ("held-out", True)):
        source = ToyboxSource({"short question": 1.0}, job.count, seed=99, held_out=held)
        for kind, values in ask(module, [source.record(i) for i in range(len(source))]).items():
            out[f"{kind}, {name}"] = values
    return out


@torch.no_grad()
def ask(module: VisualInstructionTuning, records: list[Record]) -> Scores:
    """Whether each question is answered, and the mass of the answers' words that name a toy."""
    recipe = QuestionRecipe(module.encoder.reference_size, module.encoder)
    right, mass = [], []
    for at in range(0, len(records), 32):
        some = records[at : at + 32]
        batch, _ = collate_questions([recipe(record, None, 0) for record in some])
        assert batch is not None
        right += [float(exact_match(*pair)) for pair in zip(module.answer(batch), batch.answers, strict=True)]
        with captured(module.encoder.language) as maps:
            step = module.answering_step(batch)
        columns = step.prompts.columns
        for b, record in enumerate(some):
            mask = asked_about(record)
            if mask is None:
                continue
            (start, *grid), row = columns[b][0], int(step.answered[b].nonzero()[0]) - 1  # it predicts the answer's first token
            inside = interpolate(mask[None, None], grid, mode="area").flatten()
            heads = torch.cat([m.rows(torch.tensor([b]), torch.tensor([row]))[0] for m in maps.values()])  # [heads of all layers, tokens]
            looked = heads.mean(0)[start : start + len(inside)]
            mass.append(float((looked * inside).sum() / looked.sum()))
    return {"accuracy": right, "mass": mass}


def asked_about(record: Record) -> Tensor | None:
    """The true mask [64, 64] of the toy whose colour or shape a question asks for."""
    scene = record.extra["truth"].scene
    for placed, mask in zip(scene.toys, draw(scene)[1], strict=True):
        toy = placed.toy
        if (record.question, record.answer) in (
            (f"which colour is the {toy.shape}?", toy.colour),
            (f"which shape is {toy.colour}?", toy.shape),
        ):
            return torch.from_numpy(mask).float()
    return None


# -- tables ----------------------------------------------------------------------------------------------------------------------


def main() -> None:
    args = arguments("runs/claims/lavender", 512, steps=240)
    make_targets(Path(args.runs).resolve(), args.steps * BATCH)
    scores = work(args, [["before", *TARGETS]], measure)
    found = {name: [{k: float(np.mean(v)) for k, v in scores[name, s].items()} for s in args.seeds] for name in ("before", *TARGETS)}
    columns = list(found["before"][0])
    print("\n" + " " * 12 + "".join(f"{c:>22}" for c in columns))
    for name, runs in found.items():
        cells = [interval([run[c] for run in runs]) for c in columns]
        print(f"{name:<12}" + "".join(f"{mean:>13.3f} ± {half:.3f}" for mean, half in cells))
    print()
    for kind, sign, bar in (("seen", ">=", 0.0), ("held-out", ">=", 0.1)):
        for name in ("alignment", "noise"):
            pairs = zip(found[name], found["language"], strict=True)
            gains = [a[f"accuracy, {kind}"] / b[f"accuracy, {kind}"] - 1 for a, b in pairs]
            limit = (sign, bar) if name == "alignment" else ("<=", 0.0)
            print(claim(f"{name} over the language loss alone, {kind}, relative", gains, *limit))
    more = [a["mass, held-out"] / b["mass, held-out"] for a, b in zip(found["alignment"], found["before"], strict=True)]
    print(claim("attention mass after alignment over before, held-out", more, ">=", 1.5))


if __name__ == "__main__":
    main()

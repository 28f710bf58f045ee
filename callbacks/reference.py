"""Likeness to references of held-out pictures, and the probes that tell what such a score is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_mmgen.metrics.clip import CLIPSimilarity
from lightning_mmgen.metrics.following import interval
from lightning_mmgen.metrics.mean import PictureMean
from lightning_mmgen.metrics.probes import CopyPaste, Hiding, Movement, hide, reword
from lightning_mmgen.metrics.regions import Detected, RecordBoxes, Regions, region_masks
from lightning_mmgen.metrics.similarity import FaceSimilarity, ReferenceSimilarity, SubjectSimilarity
from lightning_mmgen.models.clip import Clip
from lightning_mmgen.models.features import Features
from lightning_mmgen.prompt import Record

from .held_out import HeldOut, HeldOutCallback, draw, gathered, held_out_parts
from .rows import log_scores, write_rows

PROBES = ("ignored_inside", "ignored_outside", "ignored", "reworded")
TITLES = {
    "clip_t": "caption, CLIP-T",
    "clip_i": "each reference, CLIP-I",
    "dino": "each reference, DINO",
    "face": "each face",
    "clip_i_real": "real pictures, CLIP-I",
    "dino_real": "real pictures, DINO",
    "copy_paste": "copy-paste",
    "ignored_inside": "reference hidden, inside",
    "ignored_outside": "reference hidden, outside",
    "ignored": "reference hidden, whole",
    "reworded": "one word changed",
}


class ReferenceEvaluation(HeldOutCallback):
    """CLIP-I and DINO of each reference with its region of the held-out pictures, beside the probes: before training, every ``every``
    steps, at the end, and in a test.

    ``copy_paste`` is how much more of its references a picture repeats than its target does. The first ``probes`` instructions are drawn
    again, with the same noise, with a reference hidden (``ignored_inside`` and ``ignored_outside`` its region, ``ignored`` all of the
    picture; 0 where the reference is not read) and with a word changed (``reworded``): how far the picture moves. Pictures that are not
    finite have no score, and are counted (``bad_pictures``).

    Args:
        every: optimizer steps between evaluations; 0 for before and after only.
        count: held-out instructions; 0 for all.
        clip: any CLIP of ``transformers`` by name or folder.
        dino: any DINO; its patches are the copy-paste probe's, in place of the CLIP's.
        face: any face model.
        detector: a GroundingDINO that finds the references' phrases in the pictures; by default the record's boxes say where they are.
        captions: score captions too (CLIP-T).
        probes: how many instructions are drawn again.
        hiding: a reference is ``blank``, its tiles ``shuffle`` places, or it is swapped (``swap``) with one of the next record.
        budget: seconds of one evaluation; it ends with the batch in which they have passed, on all ranks.
        batch_size: of one device.
    """

    at_start = True

    def __init__(
        self,
        every: int = 0,
        count: int = 64,
        clip: str = "toybox/clip",
        dino: str | None = None,
        face: str | None = None,
        detector: str | None = None,
        captions: bool = False,
        probes: int = 16,
        hiding: Hiding = "blank",
        budget: float | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__(every, count)
        self.models = {"clip": clip, "dino": dino, "face": face, "detector": detector}
        self.captions, self.probes, self.hiding, self.budget, self.batch_size = captions, probes, hiding, budget, batch_size
        self.metrics: dict[str, PictureMean] = {}
        self.captioned: CLIPSimilarity | None = None
        self.regions: Regions = RecordBoxes()
        self.before: dict[str, list[float]] = {}
        self.after: dict[str, list[float]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the metrics' models: before anything else, so that one that is missing is told at once."""
        if self.metrics:
            return
        clip, dino, face, detector = self.models.values()
        assert clip is not None
        with isolate_rng():
            if detector is not None:
                from lightning_mmgen.build.detector import Detector

                self.regions = Detected(Detector(detector))
            first = Clip(clip) if self.captions else Features(clip)
            eyes = {"clip_i": first} | ({"dino": Features(dino)} if dino else {})
            for name, features in eyes.items():
                self.metrics[name] = ReferenceSimilarity(features, self.regions)
                self.metrics[f"{name}_real"] = SubjectSimilarity(features)
            if face is not None:
                self.metrics["face"] = FaceSimilarity(face, self.regions if detector else None)
            self.metrics["copy_paste"] = CopyPaste(eyes.get("dino", eyes["clip_i"]))
            self.captioned = CLIPSimilarity(first) if isinstance(first, Clip) else None

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows: list[dict[str, float]] = []
        bad = 0
        for first, part in held_out_parts(trainer, pl_module, self.count, self.batch_size, self.budget):
            scores = self._score(trainer, pl_module, first, part)
            bad += sum("bad" in row for row in scores)
            write_rows(trainer, "reference", part, [{k: v for k, v in row.items() if k != "bad"} for row in scores], first)
            rows += scores
        if not rows:
            raise ValueError("ReferenceEvaluation: there are no held-out records; data.held_out names them")
        names = [name for name in TITLES if any(name in row for row in rows)]
        found = {name: [row[name] for row in rows if name in row] for name in names}
        means = {f"held_out/{name}": float(torch.tensor(values).mean()) for name, values in found.items()}
        log_scores(trainer, means | {"held_out/scored": float(len(rows) - bad), "held_out/bad_pictures": float(bad)})
        self.before, self.after = (self.before, found) if self.before else (found, {})

    def _score(self, trainer: Trainer, pl_module: LightningModule, first: int, part: HeldOut) -> list[dict[str, float]]:
        """The scores of each picture, without those that it does not have; ``bad`` where it is not finite. Every rank scores its share."""
        own = range(trainer.global_rank, len(part.records), trainer.world_size)
        columns = self._likeness([part.records[i] for i in own], part.pictures[list(own)], pl_module.device)
        world = trainer.world_size
        scores = torch.full((-(-len(part.records) // world), len(columns)), torch.nan, dtype=torch.float64)
        if len(own):
            scores[: len(own)] = torch.stack([column.double().cpu() for column in columns.values()], 1)
        names, every = [*columns], gathered(trainer, scores, len(part.records))
        probed = [i for i, r in enumerate(part.records) if first + i < self.probes and part.pictures[i].isfinite().all()]
        moved = self._probe(trainer, pl_module, first, part, probed) if probed else {}
        names, every = [*names, *moved], torch.cat([every, *(column.double()[:, None] for column in moved.values())], 1)
        finite = part.pictures.isfinite().flatten(1).all(1).tolist()
        rows = [{n: float(v) for n, v in zip(names, row, strict=True) if v.isfinite()} for row in every]
        return [row if good else {"bad": 1.0} for row, good in zip(rows, finite, strict=True)]

    def _likeness(self, records: Sequence[Record], pictures: Tensor, device: torch.device) -> dict[str, Tensor]:
        """What needs the pictures alone, by name, [n] each."""
        out = {}
        pictures = pictures.to(device)
        for name, metric in self.metrics.items():
            out[name] = metric.to(device).score(pictures, records) if records else pictures.new_zeros(0)
        if self.captioned is not None:
            captions = [r.caption or "" for r in records]
            out["clip_t"] = self.captioned.to(device).score(pictures, captions) if records else pictures.new_zeros(0)
        return out

    def _probe(self, trainer: Trainer, pl_module: LightningModule, first: int, part: HeldOut, probed: list[int]) -> dict[str, Tensor]:
        """How far the pictures of the part move, by the name of the probe, [n] each; nan where a picture is not probed."""
        out = {name: torch.full((len(part.records),), torch.nan) for name in PROBES}
        records = part.records
        shown = [i for i in probed if records[i].references]
        slots = [(first + i) % len(records[i].references) for i in shown]
        others = [next((r for r in (*records[i + 1 :], *records[:i]) if r.references), None) for i in shown]
        if self.hiding == "swap":
            shown, slots, others = ([x for x, o in zip(some, others, strict=True) if o] for some in (shown, slots, others))  # type: ignore[assignment]
        if shown:
            hidden = [hide(records[i], slot, self.hiding, o) for i, slot, o in zip(shown, slots, others, strict=True)]
            redrawn, pictures = draw(trainer, pl_module, hidden, [first + i for i in shown]), part.pictures[shown]
            found = self.regions(pictures, [records[i] for i in shown])
            masks = region_masks([row[slot] for row, slot in zip(found, slots, strict=True)], *pictures.shape[-2:])
            for where, name in (("inside", "ignored_inside"), ("outside", "ignored_outside"), ("whole", "ignored")):
                out[name][shown] = Movement(where).score(pictures, redrawn, masks)  # type: ignore[arg-type]
        changed = {i: new for i in probed if (new := reword(records[i])) is not None}
        if changed:
            redrawn = draw(trainer, pl_module, [*changed.values()], [first + i for i in changed])
            out["reworded"][[*changed]] = Movement().score(part.pictures[[*changed]], redrawn)
        return out

    def table(self) -> str:
        """Before and after, with 95 % confidence intervals (bootstrap over pictures)."""
        if not (self.before or self.after):
            return ""
        looks = [self.before, self.after] if self.after else [self.before]
        count = max(len(values) for values in looks[-1].values())
        lines = [f"{f'likeness of {count} pictures':<28}" + "".join(f"{t:>18}" for t in ("before", "after")[: len(looks)])]
        for name, title in TITLES.items():
            if name in looks[-1]:
                lines.append(f"{title:<28}" + "".join(f"{_cell(look.get(name, [])):>18}" for look in looks))
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    scores = torch.tensor(values)
    return f"{float(scores.mean()):.3f} ± {float(interval(scores)):.3f}"

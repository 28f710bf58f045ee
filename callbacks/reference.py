"""Likeness to references of held-out pictures, and the probes that tell what such a score is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_mmgen.data.images import crop_square, open_picture, pixels
from lightning_mmgen.metrics.clip import CLIPSimilarity
from lightning_mmgen.metrics.distribution import FID, KID
from lightning_mmgen.metrics.mean import PictureMean
from lightning_mmgen.metrics.probes import CopyPaste, Hiding, Movement, hide, reword
from lightning_mmgen.metrics.regions import Detected, RecordBoxes, Regions, region_masks
from lightning_mmgen.metrics.similarity import FaceSimilarity, ReferenceSimilarity, SubjectSimilarity
from lightning_mmgen.models.clip import Clip
from lightning_mmgen.models.features import Features
from lightning_mmgen.prompt import Record

from .held_out import HeldOut, draw, held_out_count
from .scoring import PictureEvaluation

PROBES = ("ignored_inside", "ignored_outside", "ignored", "reworded")


class ReferenceEvaluation(PictureEvaluation):
    """CLIP-I and DINO of each reference with its region of the held-out pictures, beside the probes.

    ``copy_paste`` is how much more of its references a picture repeats than its target does. The first ``probes`` instructions are drawn
    again, with the same noise, with a reference hidden (``ignored_inside`` and ``ignored_outside`` its region, ``ignored`` all of the
    picture; 0 where the reference is not read) and with a word changed (``reworded``): how far the picture moves.

    Args:
        clip: any CLIP of ``transformers`` by name or folder.
        dino: any DINO; its patches are the copy-paste probe's, in place of the CLIP's.
        face: any face model.
        detector: a GroundingDINO that finds the references' phrases in the pictures; by default the record's boxes say where they are.
        distribution: any picture model, or ``inception`` (extra ``fid``), for FID and KID of the pictures and their targets, which are
            compared between equal numbers of pictures only; none by default.
        captions: score captions too (CLIP-T).
        probes: how many instructions are drawn again.
        hiding: a reference is ``blank``, its tiles ``shuffle`` places, or it is swapped (``swap``) with one of another record: of the first
            that shows something else, from the middle of the held-out set after it on (a suite has its prompts of one subject in a row).
        look: see :class:`PictureEvaluation`.
    """

    name = "reference"
    heading = "likeness of {} pictures"
    titles = {
        "clip_t": "caption, CLIP-T",
        "clip_i": "each reference, CLIP-I",
        "dino": "each reference, DINO",
        "face": "each face",
        "clip_i_real": "real pictures, CLIP-I",
        "dino_real": "real pictures, DINO",
        "fid": "all targets, FID",
        "kid": "all targets, KID",
        "copy_paste": "copy-paste",
        "ignored_inside": "reference hidden, inside",
        "ignored_outside": "reference hidden, outside",
        "ignored": "reference hidden, whole",
        "reworded": "one word changed",
    }

    def __init__(
        self,
        clip: str = "toybox/clip",
        dino: str | None = None,
        face: str | None = None,
        detector: str | None = None,
        distribution: str | None = None,
        captions: bool = False,
        probes: int = 16,
        hiding: Hiding = "blank",
        **look: Any,
    ) -> None:
        super().__init__(**look)
        self.clip, self.dino, self.face, self.detector, self.distribution = clip, dino, face, detector, distribution
        self.captions, self.probes, self.hiding = captions, probes, hiding
        self.metrics: dict[str, PictureMean] = {}
        self.captioned: CLIPSimilarity | None = None
        self.distances: dict[str, FID | KID] = {}
        self.compared = 0
        self.regions: Regions = RecordBoxes()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the metrics' models: before anything else, so that one that is missing is told at once."""
        if self.metrics:
            return
        with isolate_rng():
            if self.detector is not None:
                from lightning_mmgen.build.detector import Detector

                self.regions = Detected(Detector(self.detector))
            first = Clip(self.clip) if self.captions else Features(self.clip)
            eyes = {"clip_i": first} | ({"dino": Features(self.dino)} if self.dino else {})
            for name, features in eyes.items():
                self.metrics[name] = ReferenceSimilarity(features, self.regions)
                self.metrics[f"{name}_real"] = SubjectSimilarity(features)
            if self.face is not None:
                self.metrics["face"] = FaceSimilarity(self.face, self.regions if self.detector else None)
            self.metrics["copy_paste"] = CopyPaste(eyes.get("dino", eyes["clip_i"]))
            self.captioned = CLIPSimilarity(first) if isinstance(first, Clip) else None
            if self.distribution is not None:
                self.distances = {"fid": FID(self.distribution), "kid": KID(self.distribution)}

    def score(self, trainer: Trainer, records: Sequence[Record], pictures: Tensor) -> dict[str, Tensor]:
        out = {name: metric.to(pictures.device).score(pictures, records) for name, metric in self.metrics.items()}
        if self.captioned is not None:
            out["clip_t"] = self.captioned.to(pictures.device).score(pictures, [r.caption or "" for r in records])
        return out

    def look_again(self, trainer: Trainer, pl_module: LightningModule, first: int, part: HeldOut, good: Sequence[int]) -> dict[str, Tensor]:
        if self.distances:
            self._compare(trainer, pl_module.device, part, good)
        probed = [i for i in good if first + i < self.probes]
        if not probed:
            return {}
        out = {name: torch.full((len(part.records),), torch.nan) for name in PROBES}
        if hidden := self._hidden(trainer, first, part, probed):
            shown, slots = [*hidden], [slot for slot, _ in hidden.values()]
            pictures, redrawn = part.pictures[shown], draw(trainer, pl_module, [r for _, r in hidden.values()], [first + i for i in shown])
            found = self.regions(pictures, [part.records[i] for i in shown])
            masks = region_masks([row[slot] for row, slot in zip(found, slots, strict=True)], *pictures.shape[-2:])
            for where, name in (("inside", "ignored_inside"), ("outside", "ignored_outside"), ("whole", "ignored")):
                out[name][shown] = Movement(where).score(pictures, redrawn, masks)  # type: ignore[arg-type]
        changed = {i: new for i in probed if (new := reword(part.records[i])) is not None}
        if changed:
            redrawn = draw(trainer, pl_module, [*changed.values()], [first + i for i in changed])
            out["reworded"][[*changed]] = Movement().score(part.pictures[[*changed]], redrawn)
        return {name: column[list(good)] for name, column in out.items()}

    def _hidden(self, trainer: Trainer, first: int, part: HeldOut, probed: Sequence[int]) -> dict[int, tuple[int, Record]]:
        """By their number in the part, the records that show anything: which of their references is hidden, and the record without it."""
        out = {}
        for i in probed:
            record = part.records[i]
            slot = (first + i) % max(len(record.references), 1)
            other = self._other(trainer, first, part, i) if self.hiding == "swap" and record.references else None
            if record.references and (other is not None or self.hiding != "swap"):
                out[i] = slot, hide(record, slot, self.hiding, other)
        return out

    def _other(self, trainer: Trainer, first: int, part: HeldOut, i: int) -> Record | None:
        """The first of all held-out records that shows something else than this one, half of them further on; None where no other does."""
        count, shown = held_out_count(trainer, self.count), [open_picture(r.image) for r in part.records[i].references]
        for place in ((first + i + count // 2 + k) % count for k in range(count)):
            here = 0 <= place - first < len(part.records)
            record = part.records[place - first] if here else trainer.datamodule.held_out_records(1, place)[0]  # type: ignore[attr-defined]
            if record.references and all(open_picture(r.image) not in shown for r in record.references):
                return record
        return None

    def _compare(self, trainer: Trainer, device: torch.device, part: HeldOut, good: Sequence[int]) -> None:
        """Take this rank's share of the pictures and their targets into FID and KID."""
        chosen = {i: target for i in good if (target := part.records[i].target) is not None}
        self.compared += len(chosen)
        if own := [*chosen][trainer.global_rank :: trainer.world_size]:
            real = torch.stack([crop_square(pixels(chosen[i]), part.pictures.shape[-1]) for i in own]).to(device)
            for metric in self.distances.values():
                metric.to(device).update(part.pictures[own].to(device), real)

    def together(self, trainer: Trainer) -> dict[str, float]:
        """FID and KID, where there are two pictures at least to compare; KID of subsets of 1,000, or of all where there are fewer."""
        out = {}
        with isolate_rng():
            torch.manual_seed(0)
            for name, metric in self.distances.items():
                if isinstance(metric, KID):
                    metric.subset_size = min(1000, self.compared)
                if self.compared > 1:
                    out[name] = float(metric.compute())
                metric.reset()
        self.compared = 0
        return out

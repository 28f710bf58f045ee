"""How near held-out edits come to their targets, and whether they move as their captions do."""

from __future__ import annotations

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_mmgen.data.images import crop_square, pixels
from lightning_mmgen.metrics.clip import DirectionalSimilarity
from lightning_mmgen.metrics.similarity import ImageSimilarity
from lightning_mmgen.models.clip import Clip
from lightning_mmgen.models.features import Features
from lightning_mmgen.prompt import Picture, Record

from .held_out import HeldOutCallback, held_out_parts
from .rows import log_scores, write_rows


class EditEvaluation(HeldOutCallback):
    """MagicBrush's scores of held-out edits with their targets (Zhang et al. 2023, section 5.1: ``l1``, ``l2`` of pixels in [0, 1],
    ``target_clip_i``, ``target_dino``, ``clip_t`` with the caption of the target), and InstructPix2Pix's (Brooks et al. 2023, section 4.1:
    ``directional``, and ``source_clip_i``, which a copy of the source has as 1). Records that are no edit are left out.

    Args:
        every: optimizer steps between evaluations; 0 for before and after only.
        count: held-out records; 0 for all.
        clip: any CLIP of ``transformers`` by name or folder.
        dino: any DINO; None leaves its score out.
        budget: seconds of one evaluation; it ends with the batch in which they have passed, on all ranks.
        batch_size: of one device.
    """

    at_start = True

    def __init__(
        self,
        every: int = 0,
        count: int = 64,
        clip: str = "openai/clip-vit-base-patch32",
        dino: str | None = "facebook/dino-vits16",
        budget: float | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__(every, count)
        self.clip, self.dino, self.budget, self.batch_size = clip, dino, budget, batch_size
        self.eyes: dict[str, ImageSimilarity] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.eyes:
            return
        with isolate_rng():
            clip = Clip(self.clip)
            self.eyes["clip_i"], self.direction = ImageSimilarity(clip), DirectionalSimilarity(clip)
            if self.dino is not None:
                self.eyes["dino"] = ImageSimilarity(Features(self.dino))

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows: list[dict[str, float]] = []
        for first, part in held_out_parts(trainer, pl_module, self.count, self.batch_size, self.budget):
            scores = [self._score(r, p, pl_module.device) if _source(r) else None for r, p in zip(*part, strict=True)]
            write_rows(trainer, "edits", part, scores, first)
            rows += [row for row in scores if row is not None]
        if not rows:
            raise ValueError("EditEvaluation: no held-out record is an edit")
        names = dict.fromkeys(name for row in rows for name in row)
        found = {name: torch.tensor([row[name] for row in rows if name in row]) for name in names}
        log_scores(trainer, {f"held_out/{name}": float(values.mean()) for name, values in found.items()})

    def _score(self, record: Record, picture: Tensor, device: torch.device) -> dict[str, float]:
        """The scores of one edit; nothing of a picture that is not finite."""
        if not picture.isfinite().all() or record.target is None:
            return {}
        side = picture.shape[-1]
        drawn = picture[None].to(device)
        source, target = (crop_square(pixels(p), side)[None].to(device) for p in (_source(record), record.target))  # type: ignore[arg-type]
        difference = (drawn - target) / 2
        out = {"l1": difference.abs().mean(), "l2": difference.square().mean()}
        for name, metric in self.eyes.items():
            out[f"target_{name}"] = metric.to(device).score(drawn, target)
        out["source_clip_i"] = self.eyes["clip_i"].score(drawn, source)
        if record.caption:
            clip = self.direction.to(device).clip
            out["clip_t"] = (clip.embed(drawn) * clip.embed_texts([record.caption])).sum()
            if record.source_caption:
                out["directional"] = self.direction.score(drawn, source, [record.caption], [record.source_caption])
        return {name: float(value) for name, value in out.items()}


def _source(record: Record) -> Picture | None:
    return next((r.image for r in record.references if r.role == "source"), None)

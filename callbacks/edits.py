"""How near held-out edits come to their targets, and whether they move as their captions do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_mmgen.data.images import crop_square, pixels
from lightning_mmgen.metrics.clip import CLIPSimilarity, DirectionalSimilarity
from lightning_mmgen.metrics.similarity import ImageSimilarity
from lightning_mmgen.models.clip import Clip
from lightning_mmgen.models.features import Features
from lightning_mmgen.prompt import Picture, Record

from .scoring import PictureEvaluation


class EditEvaluation(PictureEvaluation):
    """MagicBrush's scores of held-out edits with their targets (Zhang et al. 2023, section 5.1: ``l1``, ``l2`` of pixels in [0, 1],
    ``target_clip_i``, ``target_dino``, ``clip_t`` with the caption of the target), and InstructPix2Pix's (Brooks et al. 2023, section 4.1:
    ``directional``, and ``source_clip_i``, which a copy of the source has as 1). Records without a source or a target are left out.

    Args:
        clip: any CLIP of ``transformers`` by name or folder.
        dino: any DINO; None leaves its score out.
        look: see :class:`PictureEvaluation`.
    """

    name = "edits"
    nothing = "no held-out record is an edit"

    def __init__(self, clip: str = "openai/clip-vit-base-patch32", dino: str | None = "facebook/dino-vits16", **look: Any) -> None:
        super().__init__(**look)
        self.clip, self.dino = clip, dino
        self.eyes: dict[str, ImageSimilarity] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.eyes:
            return
        with isolate_rng():
            clip = Clip(self.clip)
            self.eyes["clip_i"], self.caption, self.direction = ImageSimilarity(clip), CLIPSimilarity(clip), DirectionalSimilarity(clip)
            if self.dino is not None:
                self.eyes["dino"] = ImageSimilarity(Features(self.dino))

    def concerns(self, record: Record) -> bool:
        return _source(record) is not None and record.target is not None

    def score(self, trainer: Trainer, records: Sequence[Record], pictures: Tensor) -> dict[str, Tensor]:
        device, side = pictures.device, pictures.shape[-1]
        both = zip(*((_source(r), r.target) for r in records), strict=True)
        sources, targets = (torch.stack([crop_square(pixels(p), side) for p in some if p is not None]).to(device) for some in both)
        difference = ((pictures - targets) / 2).flatten(1)
        out = {"l1": difference.abs().mean(1), "l2": difference.square().mean(1)}
        for name, metric in self.eyes.items():
            out[f"target_{name}"] = metric.to(device).score(pictures, targets)
        out["source_clip_i"] = self.eyes["clip_i"].score(pictures, sources)
        captions, before = ([text or "" for text in texts] for texts in zip(*((r.caption, r.source_caption) for r in records), strict=True))
        out["clip_t"] = self.caption.to(device).score(pictures, captions)
        told = torch.tensor([bool(a and b) for a, b in zip(captions, before, strict=True)], device=device)
        out["directional"] = self.direction.to(device).score(pictures, sources, captions, before).where(told, torch.nan)
        return out


def _source(record: Record) -> Picture | None:
    return next((r.image for r in record.references if r.role == "source"), None)

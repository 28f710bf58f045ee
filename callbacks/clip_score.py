"""CLIP score of held-out instructions."""

from __future__ import annotations

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_mmgen.metrics.clip import CLIPSimilarity

from .held_out import HeldOutCallback, held_out
from .rows import log_scores, write_rows

BATCH = 32  # pictures that are scored at once


class CLIPScoreEvaluation(HeldOutCallback):
    """CLIP-T of the held-out pictures with their plain captions, before training, every ``every`` steps, and at the end.

    Args:
        every: optimizer steps between evaluations; 0 for before and after only.
        count: held-out instructions; those without a caption are left out.
        model: any CLIP of ``transformers`` by name or folder.
        budget: seconds of one evaluation; it ends with the batch in which they have passed, on all ranks.
    """

    at_start = True

    def __init__(self, every: int = 0, count: int = 64, model: str = "toybox/clip", budget: float | None = None) -> None:
        super().__init__(every, count)
        self.model, self.budget = model, budget
        self.metric: CLIPSimilarity | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.metric is None:
            with isolate_rng():
                self.metric = CLIPSimilarity(self.model)

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.metric is not None
        records, pictures = looked = held_out(trainer, pl_module, self.count, seconds=self.budget)
        if not any((r.caption or "").strip() for r in records):
            raise ValueError("CLIPScoreEvaluation: no held-out record has a caption")
        metric, captions = self.metric.to(pl_module.device), [(r.caption or "").strip() for r in records]
        parts = [slice(at, at + BATCH) for at in range(0, len(records), BATCH)]
        scores = torch.cat([metric.score(pictures[part].to(pl_module.device), captions[part]) for part in parts]).cpu()
        write_rows(trainer, "clip_score", looked, [{"clip_t": float(s)} if c else None for s, c in zip(scores, captions, strict=True)])
        log_scores(trainer, {"held_out/clip_t": float(scores[[bool(c) for c in captions]].mean())})

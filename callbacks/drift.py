"""Drift of held-out edits outside their masks."""

from __future__ import annotations

import torch
from lightning import LightningModule, Trainer

from lightning_mmgen.data.datamodule import MultimodalDataModule, Recipe
from lightning_mmgen.metrics.drift import MaskedMSE, MaskedPSNR, MaskedSSIM

from .held_out import HeldOutCallback, held_out

METRICS = {"mse": MaskedMSE, "psnr": MaskedPSNR, "ssim": MaskedSSIM}


class DriftEvaluation(HeldOutCallback):
    """MSE, PSNR and SSIM of the held-out edits against their sources outside the mask, before training, every ``every`` steps, and at the
    end. A copy of the source drifts least: look at it beside a score of the edits' success.

    Args:
        every: optimizer steps between evaluations; 0 for before and after only.
        count: held-out records; those that are no edit are left out, and so are edits of the whole picture.
    """

    at_start = True

    def __init__(self, every: int = 0, count: int = 64) -> None:
        super().__init__(every, count)

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        records, pictures = held_out(trainer, pl_module, self.count)
        data: MultimodalDataModule = trainer.datamodule  # type: ignore[attr-defined]
        recipe: Recipe = data.held_out_recipe
        samples = [recipe(record, None, 0) for record in records]
        edits = [i for i, s in enumerate(samples) if s.source is not None]
        if not edits:
            raise ValueError("DriftEvaluation: no held-out record is an edit; data: EditDataModule reads edits")
        drawn = pictures[edits]
        sources, masks = (torch.stack([getattr(samples[i], name) for i in edits]) for name in ("source", "mask"))
        scores = {}
        for name, kind in METRICS.items():
            metric = kind()
            metric.update(drawn, sources, masks)
            scores[f"held_out/drift_{name}"] = float(metric.compute())
        for logger in trainer.loggers:
            logger.log_metrics(scores, trainer.global_step)

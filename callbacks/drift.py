"""Drift of held-out edits outside their masks."""

from __future__ import annotations

from lightning import LightningModule, Trainer

from lightning_mmgen.data.datamodule import MultimodalDataModule
from lightning_mmgen.data.recipe import Recipe
from lightning_mmgen.metrics.drift import MaskedMSE, MaskedPSNR, MaskedSSIM

from .held_out import HeldOutCallback, held_out
from .rows import log_scores, write_rows

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
        records, pictures = looked = held_out(trainer, pl_module, self.count)
        data: MultimodalDataModule = trainer.datamodule  # type: ignore[attr-defined]
        recipe: Recipe = data.held_out_recipe
        samples = [recipe(record, None, 0) for record in records]
        if all(s.source is None for s in samples):
            raise ValueError("DriftEvaluation: no held-out record is an edit; data: EditDataModule reads edits")
        metrics = {f"drift_{name}": kind() for name, kind in METRICS.items()}
        rows: list[dict[str, float] | None] = []
        for sample, picture in zip(samples, pictures, strict=True):
            if sample.source is None or sample.mask is None:
                rows.append(None)
            else:
                edit = (picture[None], sample.source[None], sample.mask[None])
                rows.append({name: float(metric(*edit)) for name, metric in metrics.items()})
        write_rows(trainer, "drift", looked, rows)
        log_scores(trainer, {f"held_out/{name}": float(metric.compute()) for name, metric in metrics.items()})

"""Drift of held-out edits outside their masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning import Trainer
from torch import Tensor

from lightning_mmgen.data.datamodule import MultimodalDataModule
from lightning_mmgen.metrics.drift import MaskedMSE, MaskedPSNR, MaskedSSIM
from lightning_mmgen.prompt import Record

from .scoring import PictureEvaluation

METRICS = {"mse": MaskedMSE, "psnr": MaskedPSNR, "ssim": MaskedSSIM}


class DriftEvaluation(PictureEvaluation):
    """MSE, PSNR and SSIM of the held-out edits against their sources outside the mask; an edit of the whole picture has none, and records
    that are no edit are left out. A copy of the source drifts least: look at it beside a score of the edits' success.

    Arguments as of :class:`PictureEvaluation`.
    """

    name = "drift"
    nothing = "no held-out record is an edit; data: EditDataModule reads edits"

    def concerns(self, record: Record) -> bool:
        return any(r.role == "source" for r in record.references)

    def score(self, trainer: Trainer, records: Sequence[Record], pictures: Tensor) -> dict[str, Tensor]:
        data: MultimodalDataModule = trainer.datamodule  # type: ignore[attr-defined]
        samples = [data.held_out_recipe(record, None, 0) for record in records]
        sources, masks = ([each for s in samples if (each := getattr(s, name)) is not None] for name in ("source", "mask"))
        if len(masks) < len(samples):
            raise ValueError(f"DriftEvaluation: {self.nothing}")
        edits = pictures, *(torch.stack(each).to(pictures.device) for each in (sources, masks))
        return {f"drift_{name}": kind().score(*edits) for name, kind in METRICS.items()}

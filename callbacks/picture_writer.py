"""Writes what ``lightning predict`` draws."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_mmgen.batch import Batch
from lightning_mmgen.pipeline import to_pil


class PictureWriter(BasePredictionWriter):
    """One PNG a record, and ``pictures.jsonl`` with the instruction of each.

    Args:
        folder: where to; ``predictions`` in the run folder if none is given.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__("batch")
        self.folder = folder

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        folder = Path(self.folder or Path(trainer.log_dir or ".") / "predictions")
        folder.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        for i, (picture, name) in enumerate(zip(to_pil(prediction), batch.ids, strict=True)):
            path = folder / f"{batch_idx:05d}-{i:02d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:80]}.png"
            picture.save(path)
            rows.append({"picture": path.name, "instruction": batch.instructions[i], "id": name})
        with (folder / "pictures.jsonl").open("a" if batch_idx else "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

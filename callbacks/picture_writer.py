"""Writes what ``lightning predict`` draws or answers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_mmgen.batch import Batch, QuestionBatch
from lightning_mmgen.folder import run_folder
from lightning_mmgen.pipeline import to_pil


class PictureWriter(BasePredictionWriter):
    """One PNG a record, and ``pictures.jsonl`` with the instruction of each; of questions, ``answers.jsonl``.

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
        prediction: Tensor | list[str],
        batch_indices: Sequence[int] | None,
        batch: Batch | QuestionBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        folder = Path(self.folder or (run_folder(trainer) or Path()) / "predictions")
        folder.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        if isinstance(batch, QuestionBatch):
            given = zip(batch.ids, batch.instructions, prediction, batch.answers, strict=True)
            rows = [{"id": name, "question": text, "said": said, "answer": answer} for name, text, said, answer in given]
            self._list(rows, folder / "answers.jsonl", batch_idx)
            return
        assert isinstance(prediction, Tensor)
        for i, (picture, name) in enumerate(zip(to_pil(prediction), batch.ids, strict=True)):
            path = folder / f"{batch_idx:05d}-{i:02d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:80]}.png"
            picture.save(path)
            rows.append({"picture": path.name, "instruction": batch.instructions[i], "id": name})
        self._list(rows, folder / "pictures.jsonl", batch_idx)

    def _list(self, rows: list[dict[str, Any]], path: Path, batch_idx: int) -> None:
        with path.open("a" if batch_idx else "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

"""What an evaluation leaves behind of every picture: a JSONL row in the run folder, and the picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning import Trainer
from torch import Tensor

from lightning_mmgen.data.images import open_picture
from lightning_mmgen.folder import run_folder
from lightning_mmgen.pipeline import to_pil
from lightning_mmgen.prompt import Record

from .held_out import HeldOut
from .loggers import log_text

FOLDER = "evaluation"
"""In the run folder: ``<name>.jsonl``, and the pictures, references and targets that its rows name."""

_saved: WeakKeyDictionary[Trainer, tuple[int, int]] = WeakKeyDictionary()


def write_rows(trainer: Trainer, name: str, looked: HeldOut, scores: Sequence[Mapping[str, float] | None], first: int = 0) -> Path | None:
    """Append a row a picture to ``evaluation/<name>.jsonl`` of the run folder; every rank calls it, the first writes.

    A row has ``step``, ``id``, ``task``, ``instruction``, ``picture``, ``references`` and ``target`` (paths relative to the run folder;
    ``picture`` is null where it holds a NaN, ``target`` where there is none) and ``scores`` by name, without those that are no number.

    Args:
        name: of the evaluation.
        looked: all held-out records of this look, and their pictures.
        scores: of each of them, by name; None leaves a record out.
        first: place of the first of them, where they are a part of a look.

    Returns:
        The file; None on other ranks, and where the run has no folder.
    """
    run = run_folder(trainer)
    if not trainer.is_global_zero or run is None:
        return None
    folder = run / FOLDER
    _save_pictures(trainer, folder, looked, first)
    rows = [
        {**_row(trainer, folder, i, record), "scores": {k: float(v) for k, v in score.items() if math.isfinite(v)}}
        for i, (record, score) in enumerate(zip(looked.records, scores, strict=True), first)
        if score is not None
    ]
    path = folder / f"{name}.jsonl"
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def _row(trainer: Trainer, folder: Path, index: int, record: Record) -> dict[str, Any]:
    def there(path: Path) -> str | None:
        return str(path.relative_to(folder.parent)) if path.is_file() else None

    return {
        "step": trainer.global_step,
        "id": record.id or trainer.datamodule.held_out.name(index),  # type: ignore[attr-defined]
        "task": record.task,
        "instruction": record.instruction,
        "picture": there(folder / "pictures" / f"{trainer.global_step:06d}-{index:04d}.png"),
        "references": [there(folder / "references" / f"{index:04d}-{r.marker}.png") for r in record.references],
        "target": there(folder / "targets" / f"{index:04d}.png"),
    }


def _save_pictures(trainer: Trainer, folder: Path, looked: HeldOut, first: int) -> None:
    """The pictures of this step, once however many evaluations look at them ; references and targets where they are not there yet."""
    if trainer not in _saved:
        lines = (f"{r.task} | {r.instruction.replace('|', '&#124;')}" for r in looked.records)
        log_text(trainer, "instructions", "\n".join(["task | instruction", "--- | ---", *lines]))
    if _saved.get(trainer, (-1, 0)) >= (trainer.global_step, first + len(looked.records)):
        return
    for name in ("pictures", "references", "targets"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, record in enumerate(looked.records, first):
        given = {folder / "references" / f"{i:04d}-{r.marker}.png": r.image for r in record.references}
        if record.target is not None:
            given[folder / "targets" / f"{i:04d}.png"] = record.target
        for path, picture in given.items():
            if not path.is_file():  # they are the same at every step
                open_picture(picture).save(path)
    for i in _finite(looked.pictures):
        (drawn,) = to_pil(looked.pictures[i : i + 1])
        drawn.save(folder / "pictures" / f"{trainer.global_step:06d}-{first + i:04d}.png", compress_level=1)
    _saved[trainer] = (trainer.global_step, first + len(looked.records))


def _finite(pictures: Tensor) -> list[int]:
    return torch.isfinite(pictures).flatten(1).all(1).nonzero().flatten().tolist()

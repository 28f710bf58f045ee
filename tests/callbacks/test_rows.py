"""Rows of evaluations: what they hold of every picture, whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning_mmgen.callbacks import HeldOut, latest_scores, log_scores, write_rows
from PIL import Image

from lightning_mmgen.data.datamodule import MultimodalDataModule
from lightning_mmgen.data.sources import ToyboxSource


def test_rows_name_every_picture_and_leave_out_what_is_no_number(tmp_path: Path) -> None:
    source = ToyboxSource({"subject": 1.0}, length=3, held_out=True)
    data = MultimodalDataModule("toybox", source, target_size=64, reference_size=40)
    data.setup("test")
    trainer = L.Trainer(accelerator="cpu", logger=CSVLogger(str(tmp_path)), enable_checkpointing=False, enable_progress_bar=False)
    trainer.datamodule = data  # type: ignore[attr-defined]
    looked = HeldOut(data.held_out_records(3), torch.linspace(-1, 1, 3)[:, None, None, None].repeat(1, 3, 64, 64))
    looked.pictures[2, 0, 5, 5] = torch.nan
    path = write_rows(trainer, "likeness", looked, [{"clip_i": 0.5, "dino": float("nan")}, None, {"clip_i": torch.tensor(0.25)}])  # type: ignore[dict-item]
    write_rows(trainer, "other", looked, [{}, {}, {}])
    assert path is not None and path.parent.name == "evaluation"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["scores"] for row in rows] == [{"clip_i": 0.5}, {"clip_i": 0.25}]
    assert rows[1]["picture"] is None and [row["id"] for row in rows] == [looked.records[i].id for i in (0, 2)]
    run = path.parents[1]
    with Image.open(run / rows[0]["picture"]) as drawn, Image.open(run / rows[0]["target"]) as target:
        assert drawn.size == (64, 64) and drawn.getpixel((0, 0)) == (0, 0, 0)
        assert list(target.getdata()) == list(looked.records[0].target.getdata())  # type: ignore[union-attr]
    assert [len(row["references"]) for row in rows] == [len(looked.records[i].references) for i in (0, 2)]
    assert all((run / reference).is_file() for row in rows for reference in row["references"])
    log_scores(trainer, {"held_out/clip_i": 0.5})
    log_scores(trainer, {"held_out/clip_i": 0.25, "held_out/dino": 1.0})
    assert latest_scores(trainer) == {"held_out/clip_i": 0.25, "held_out/dino": 1.0}

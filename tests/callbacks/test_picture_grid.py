from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_mmgen.callbacks import grid
from PIL import Image as PILImage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_mmgen.cli import main
from lightning_mmgen.data.images import pixels
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.prompt import Record

CELL = 64  # the toybox's own size: nothing is resized


def asked(count: int) -> list[Record]:
    return list(ToyboxSource({"subject": 1.0}, length=count, seed=1))


def page(records: list[Record], columns: int, before: torch.Tensor | None = None) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.asarray(grid(records, before, torch.zeros(len(records), 3, CELL, CELL), CELL, columns))


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (4, 2, 2), (5, 2, 3), (3, 3, 1)])
def test_the_page_has_room_for_every_instruction(count: int, columns: int, rows: int) -> None:
    records = asked(count)
    most = max(len(r.references) for r in records)
    for before, cells in ((None, most + 2), (torch.zeros(count, 3, CELL, CELL), most + 3)):  # before, after, target
        height, width, _ = page(records, columns, before).shape
        assert height == 22 + rows * (CELL + 6)
        assert width == columns * (cells * (CELL + 6) + 3 * CELL + 12)


def test_the_page_holds_the_pictures_in_their_places() -> None:
    records = asked(3)
    before = torch.full((3, 3, CELL, CELL), -1.0)
    for pictures, shades in ((before, [0, 128]), (None, [128])):
        shown = page(records, 2, pictures)
        most, width = max(len(r.references) for r in records), shown.shape[1] // 2
        for i, record in enumerate(records):
            assert record.target is not None
            x, y = i % 2 * width + 6 + most * (CELL + 6) + 3 * CELL + 6, 22 + i // 2 * (CELL + 6)
            *drawn, last = (shown[y : y + CELL, x + k * (CELL + 6) :][:, :CELL] for k in range(len(shades) + 1))
            assert all((cell == shade).all() for cell, shade in zip(drawn, shades, strict=True))
            assert np.array_equal(last, ((pixels(record.target) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def test_the_dashboard_holds_pictures_losses_rates_and_the_table(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", "-c", str(experiment), "--trainer.callbacks+={class_path: PictureGrid, init_args: {every: 1, count: 2, cell: 32}}"])
    folder = tmp_path / "runs" / "tiny" / "version_0"
    events = EventAccumulator(str(folder))
    events.Reload()
    shown = events.Images("pictures")
    assert [e.step for e in shown] == [1, 2]
    for event in shown:
        with PILImage.open(io.BytesIO(event.encoded_image_string)) as a, PILImage.open(folder / f"pictures-{event.step:06d}.png") as b:
            assert np.array_equal(np.asarray(a), np.asarray(b))
    losses = {tag: [e.value for e in events.Scalars(tag)] for tag in ("loss", "loss/diffusion")}
    assert losses["loss"] == losses["loss/diffusion"] and len(losses["loss"]) == 2 and np.isfinite(losses["loss"]).all()
    rates = {"encoder.projector": 1e-2, "encoder.language": 2e-2, "adapter": 3e-2, "unet": 4e-2}
    for name, rate in rates.items():
        assert [e.value for e in events.Scalars(f"lr-AdamW/{name}")] == pytest.approx([rate, rate])
    table = events.Tensors("parameters/text_summary")[0].tensor_proto.string_val[0].decode()
    for row in ("module | training | learning rate", "encoder.language | LoRA rank 2 | 0.02", "adapter | fully trained | 0.03"):
        assert row in table

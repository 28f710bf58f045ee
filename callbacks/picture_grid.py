"""Grids of held-out instructions: references, text, the picture before, the picture now, the target."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from PIL.Image import Image
from torch import Tensor

from lightning_mmgen.data.images import open_picture, pad_square
from lightning_mmgen.folder import run_folder
from lightning_mmgen.pipeline import to_pil
from lightning_mmgen.prompt import Record

from .held_out import HeldOutCallback, held_out
from .loggers import log_picture


class PictureGrid(HeldOutCallback):
    """Draws the grid before training, every ``every`` steps, and at the end; to the run folder and the dashboard.

    Args:
        every: optimizer steps between grids; 0 for before and after only.
        count: held-out instructions.
        cell: side of a picture in the grid, in pixels.
        columns: instructions side by side.
    """

    def __init__(self, every: int = 0, count: int = 16, cell: int = 96, columns: int = 2) -> None:
        super().__init__(every, count)
        self.cell, self.columns = cell, columns
        self.before: Tensor | None = None
        self.path: Path | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.before is None:
            self.before = held_out(trainer, pl_module, self.count).pictures

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        records, pictures = held_out(trainer, pl_module, self.count)
        folder = run_folder(trainer)
        if not records or not trainer.is_global_zero or folder is None:
            return
        page = grid(records, self.before, pictures, self.cell, self.columns)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"pictures-{trainer.global_step:06d}.png"
        page.save(self.path)
        log_picture(trainer, "pictures", page)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]


def grid(records: list[Record], before: Tensor | None, after: Tensor, cell: int, columns: int) -> Image:
    """One row an instruction: references, text, before (if there is one), after, target. ``before`` and ``after`` are [n, 3, H, W] in
    [-1, 1]."""
    most = max(1, *(len(r.references) for r in records))
    text_width, gap, head = 3 * cell, 6, 22
    titles = [*(["before"] if before is not None else []), "after", "target"]
    width = (most + len(titles)) * (cell + gap) + text_width + 2 * gap
    rows = -(-len(records) // columns)
    page = PILImage.new("RGB", (width * columns, head + rows * (cell + gap)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=max(11, cell // 8))
    drawn = [to_pil(pictures) for pictures in (before, after) if pictures is not None]
    for c in range(columns):
        for i, title in enumerate(["references", *[""] * (most - 1), "", *titles]):
            x = c * width + gap + i * (cell + gap) + (text_width - cell if i > most else 0)
            pen.text((x, 4), title, "black", font)
    for i, (record, *pictures) in enumerate(zip(records, *drawn, strict=True)):
        x, y = (i % columns) * width + gap, head + (i // columns) * (cell + gap)
        for k, reference in enumerate(record.references):
            page.paste(pad_square(open_picture(reference.image)).resize((cell, cell)), (x + k * (cell + gap), y))
        x += most * (cell + gap)
        pen.multiline_text((x, y), "\n".join(textwrap.wrap(record.instruction, 34)[:6]), "black", font, spacing=2)
        x += text_width + gap
        target = open_picture(record.target) if record.target is not None else None
        for picture in (*pictures, target):
            if picture is not None:
                page.paste(pad_square(picture).resize((cell, cell)), (x, y))
            x += cell + gap
    return page

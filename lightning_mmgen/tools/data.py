"""``mmgen data check`` and ``mmgen data preview``: what is wrong with a record file, and what the model sees of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from PIL.Image import Image
from torch import Tensor

from ..data.crops import CropRecipe
from ..data.images import open_picture, pixels
from ..data.recipe import Recipe, sample_seed
from ..data.sources import RowError, Source, open_source
from ..models.encoder import Encoder
from ..models.idefics2 import Idefics2Encoder
from ..prompt import MARKER, Picture, Record, RecordError

# -- check -----------------------------------------------------------------------------------------------------------------------


def check(file: str) -> int:
    """Go over every record of a JSONL file, parquet file or ``datasets`` folder: its fields, markers, boxes and pictures, and the turns of
    its sessions.

    Prints ``FILE:ROW: reason`` for every bad row, rows counted from 1, and a summary at the end.

    Returns:
        1 if any row is bad, else 0.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no rows.
    """
    source = open_source(file)
    tasks, references, sizes = Counter[str](), list[int](), set[tuple[int, int]]()
    turns = defaultdict[str, list[tuple[int, int]]](list)
    for row in range(len(source)):
        try:
            record = source.record(row)
            if record.session is not None and record.turn is not None:
                turns[record.session].append((record.turn, row))
            sizes |= set(picture_sizes(record, source.root))
        except RecordError as error:
            print(f"{file}:{row + 1}: {_reason(error)}")
            continue
        tasks[record.task] += 1
        references.append(len(record.references))
    gaps = [gap for session, places in turns.items() if (gap := _gap(session, sorted(places)))]
    for at, reason in gaps:
        print(f"{file}:{at + 1}: {reason}")
    bad = len(source) - len(references)
    print(f"{file}: {len(source)} rows, {len(references)} good, {bad} bad{_summary(tasks, references, sizes)}")
    return 1 if bad or gaps else 0


def _gap(session: str, places: list[tuple[int, int]]) -> tuple[int, str] | None:
    """The row at which the turns of a session, sorted, are not 0, 1, 2, ..., and why; None where they are."""
    for k, (turn, row) in enumerate(places):
        if turn != k:
            return row, f"turn {turn} of session {session!r} " + (f"has no turn {k} before it" if turn > k else "comes twice")
    return None


def picture_sizes(record: Record, root: Path | None) -> list[tuple[int, int]]:
    """Open every picture of a record; the sizes (width, height) in pixels of references, target and mask.

    Raises:
        RecordError: a picture cannot be used, a question has none, a mask has not the target's size, or a box leaves the target.
    """
    if record.question is not None and not record.references:
        raise RecordError("the question has no picture")
    sizes = [_size(r.image, f"[ref#{r.marker}]", root) for r in record.references]
    if record.target is None:
        if record.mask is not None or record.boxes or record.controls:
            raise RecordError("a mask, a box or a control picture needs a target")
        return sizes
    width, height = target = _size(record.target, "target", root)
    sizes.append(target)
    if record.mask is not None:
        sizes.append(mask := _size(record.mask, "mask", root))
        if mask != target:
            raise RecordError(f"the mask has {mask[0]} x {mask[1]} pixels, the target {width} x {height}")
    for kind, picture in record.controls.items():
        _size(picture, kind, root)
    for box in record.boxes:
        if box.mask is not None and (mask := _size(box.mask, f"mask of {box.phrase!r}", root)) != target:
            raise RecordError(f"the mask of {box.phrase!r} has {mask[0]} x {mask[1]} pixels, the target {width} x {height}")
        if box.left < 0 or box.top < 0 or box.right > width or box.bottom > height:
            raise RecordError(f"the box of {box.phrase!r} leaves the target of {width} x {height} pixels")
    return sizes


def _size(picture: Picture, name: str, root: Path | None) -> tuple[int, int]:
    try:
        return open_picture(picture, root).size
    except RecordError as error:
        raise RecordError(f"{name}: {error}") from error


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, RowError) else str(error)


def _summary(tasks: Counter[str], references: list[int], sizes: set[tuple[int, int]]) -> str:
    if not references:
        return ""
    by_task = ", ".join(f"{task} {count}" for task, count in tasks.most_common())
    mean = sum(references) / len(references)
    text = f"; tasks: {by_task}; references per record: {min(references)} to {max(references)}, mean {mean:.1f}"
    if sizes:
        small, large = (extreme(sizes, key=lambda s: s[0] * s[1]) for extreme in (min, max))
        text += f"; pictures: {small[0]} x {small[1]} to {large[0]} x {large[1]}"
    return text


# -- preview ---------------------------------------------------------------------------------------------------------------------

WIDTH, MARGIN, CELL = 1200, 20, 168  # of the page, in pixels
TEXT, SMALL = ImageFont.load_default(size=18), ImageFont.load_default(size=14)
INK, FAINT, RED = "#1a1a1a", "#6b6b6b", "#c00000"


def preview(
    file: str,
    out: str | Path,
    encoder: str = "toybox/vlm",
    image_tokens: int = 25,
    target_size: int = 64,
    count: int = 12,
    crops: bool = False,
    spread: bool = False,
) -> Path:
    """Draw records of a file as the model sees them: the prompt with its tokens, the references and the target after
    their transforms. A row that cannot be used is shown as its error, in red.

    Args:
        file: JSONL file, parquet file or ``datasets`` folder.
        out: the PNG to write.
        encoder: hub name, local folder or ``toybox/<part>`` of an Idefics2; only its configuration and tokenizer are read.
        image_tokens: tokens of a reference; they set its size in pixels.
        target_size: side in pixels of the target.
        count: how many records, from the first on.
        crops: as :class:`~lightning_mmgen.data.crops.CropDataModule` trains on them by default.
        spread: so many at equal distances from the first to the last instead, for files that are sorted by subject, say.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: no such file or encoder.
        ValueError: the file holds no rows, or ``count`` is less than 1.
    """
    if count < 1:
        raise ValueError(f"count must be 1 or more, not {count}")
    source, reader = open_source(file), Idefics2Encoder(encoder, image_tokens)
    recipe = (CropRecipe if crops else Recipe)(reader.reference_size, target_size)
    count = min(count, len(source))
    numbers = np.linspace(0, len(source) - 1, count).round().astype(int).tolist() if spread else range(count)
    rows = [_row(source, i, reader, recipe) for i in numbers]
    page = PILImage.new("RGB", (WIDTH, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    page.save(out, format="PNG")
    return Path(out)


def _row(source: Source, index: int, encoder: Encoder, recipe: Recipe) -> Image:
    """One record as a strip of the page."""
    try:
        record, references, target = _transform(source.record(index), source.root, recipe, sample_seed(0, 0, index))
        counts = [encoder.tokens_of(*picture.shape[1:]) for picture in references]
        prompt = record.prompt()
        markers = [r.marker for r in record.references]
        ids, _ = encoder.tokenise(prompt.instruction, markers, counts)
    except (RecordError, ValueError) as error:
        return _strip(f"row {index + 1}", _reason(error), RED, [])
    text = MARKER.sub(lambda m: f"[ref#{int(m[1])}: {counts[markers.index(int(m[1]))]} tokens]", prompt.instruction)
    if record.answer is not None:
        text += f"\nAnswer: {record.answer}"
    pictures = [(f"[ref#{r.marker}] {r.role}", p) for r, p in zip(record.references, references, strict=True)]
    if target is not None:
        pictures.append(("target", target))
    title = [f"row {index + 1}", record.task, record.id, f"{len(ids)} tokens of at most {encoder.max_tokens}"]
    return _strip(" \u00b7 ".join(filter(None, title)), text, INK, pictures)


def _transform(record: Record, root: Path | None, recipe: Recipe, seed: int) -> tuple[Record, list[Tensor], Tensor | None]:
    """The record as a prompt, and references and target as the model gets them, [3, h, w] in [-1, 1]; a question has no target."""
    if record.target is None:
        return record, [pixels(r.image, recipe.reference_size, root) for r in record.references], None
    sample = recipe(record, root, seed)
    return sample.record, sample.references, sample.target


def _strip(title: str, text: str, ink: str, pictures: list[tuple[str, Tensor]]) -> Image:
    """A title, wrapped text below it, and below that the pictures, each over its name and size."""
    lines = _wrap(text, WIDTH - 2 * MARGIN)
    below = MARGIN + 26 + 24 * len(lines) + 8  # where the pictures begin
    columns = (WIDTH - MARGIN) // (CELL + MARGIN)
    height = below + -(-len(pictures) // columns) * (CELL + 48) + MARGIN
    strip = PILImage.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(strip)
    draw.text((MARGIN, MARGIN), title, FAINT, SMALL)
    for i, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + 26 + 24 * i), line, ink, TEXT)
    for i, (name, picture) in enumerate(pictures):
        x, y = MARGIN + i % columns * (CELL + MARGIN), below + i // columns * (CELL + 48)
        strip.paste(_thumbnail(picture), (x, y))
        draw.text((x, y + CELL + 4), name, INK, SMALL)
        draw.text((x, y + CELL + 22), f"{picture.shape[2]} x {picture.shape[1]} pixels", FAINT, SMALL)
    draw.line((MARGIN, height - 1, WIDTH - MARGIN, height - 1), "#d0d0d0")
    return strip


def _thumbnail(picture: Tensor) -> Image:
    """A square picture [3, h, h] in [-1, 1] at the side of a cell; small ones keep their hard pixels."""
    image = PILImage.fromarray(((picture + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8))
    return image.resize((CELL, CELL), PILImage.Resampling.NEAREST if image.width < CELL else PILImage.Resampling.LANCZOS)


def _wrap(text: str, width: float) -> list[str]:
    """Break text into lines of at most ``width`` pixels, at spaces where there are any."""
    lines = []
    for rest in text.splitlines():
        while rest:
            edges = enumerate(accumulate(map(_advance, rest)))  # where each letter ends
            end = next((i for i, edge in edges if edge > width), len(rest))
            if end < len(rest) and (space := rest.rfind(" ", 1, end + 1)) > 0:
                end = space
            lines.append(rest[:end])
            rest = rest[end:].lstrip()
    return lines


@cache
def _advance(letter: str) -> float:
    return TEXT.getlength(letter)

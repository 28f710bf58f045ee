"""``mmgen build edits``: published edits (a source, an instruction, a target) as records."""

from __future__ import annotations

import io
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL.Image import Image
from scipy.ndimage import binary_fill_holes
from tqdm import tqdm

from ..data.images import FORMATS, locate_file, open_picture, other_aspect
from ..prompt import Record, RecordError, Reference
from .journal import Journal, Shard, check_apart
from .layouts import Columns, Dropped, Edit, Item, Layout, open_layout

ENDINGS = {"JPEG": "jpg", "MPO": "jpg"}


@dataclass(frozen=True)
class Edits:
    """What the records depend on.

    Attributes:
        data: hub name, folder or file; see :func:`~lightning_mmgen.build.layouts.open_layout`.
        format: of ``layouts.PUBLISHED``; guessed by default.
        split: of a data set that has several.
        images: folder of pictures that are given by a path; "" for the data's own.
        max_aspect: a source and a target, or a mask, whose aspects (width / height) differ by a larger ratio are dropped.
        source_column, ...: what the data calls them; as published by default, "" for none.

    Raises:
        ValueError: ``max_aspect`` is below 1.
    """

    data: str
    format: str | None = None
    split: str = "train"
    images: str = ""
    max_aspect: float = 1.02
    source_column: str | None = None
    target_column: str | None = None
    instruction_column: str | None = None
    mask_column: str | None = None
    session_column: str | None = None
    turn_column: str | None = None
    caption_column: str | None = None
    source_caption_column: str | None = None

    def __post_init__(self) -> None:
        if not self.max_aspect >= 1:
            raise ValueError(f"--max-aspect {self.max_aspect} must be 1 or more")

    def layout(self) -> Layout:
        """The rows. Raises: FileNotFoundError, ValueError: as :func:`~lightning_mmgen.build.layouts.open_layout` does."""
        names = {part: getattr(self, f"{part}_column") for part in Columns._fields}
        return open_layout(self.data, self.format, names, self.split, self.images)


def build_edits(settings: Edits, out: str, shard: Shard = Shard()) -> str:
    """Write a record for every row that passes the rules; a stopped build goes on. Every shard reads the whole of a stream.

    Returns:
        A report: the path of the records, and counts by rule.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: data of another form, or ``out`` lies among it or holds a build with other settings.
    """
    check_apart(out, settings.data)
    layout = settings.layout()
    journal = Journal(out, {**asdict(settings), "digest": layout.digest}, shard)
    importer = Importer(layout, settings.max_aspect, journal.out)
    for item in tqdm(islice(layout.items(), shard.index, None, shard.count), desc="edits", disable=None):
        if item.key not in journal.done:
            records, counts = importer(item)
            journal.add(item.key, records, counts)
    return journal.conclude()


class Importer:
    """Makes records of edits, and their pictures part of the build.

    Args:
        layout: the rows.
        max_aspect: largest ratio of two aspects.
        out: folder of the build.
    """

    def __init__(self, layout: Layout, max_aspect: float, out: Path) -> None:
        self.layout, self.max_aspect, self.out = layout, max_aspect, out

    def __call__(self, item: Item) -> tuple[list[Record], Counter[str]]:
        """The records of a row or a session, and counts by rule. A session ends at the first turn that is missing, repeated or dropped."""
        records: list[Record] = []
        counts: Counter[str] = Counter()
        for place, (number, row) in enumerate(item.rows):
            counts["rows"] += 1
            try:
                edit = self.layout.edit(row)
                if edit.turn is not None and not edit.turn == place == len(records):
                    raise Dropped("turn gap")
                records.append(self.record(number, edit, counts))
                counts["kept"] += 1
            except RecordError as error:
                reason = error if isinstance(error, Dropped) else Dropped("bad row", str(error))
                counts[reason.rule] += 1
                if reason.detail:
                    tqdm.write(f"row {number + 1}: {reason.rule}: {reason.detail}", sys.stderr)
        return records, counts

    def record(self, number: int, edit: Edit, counts: Counter[str]) -> Record:
        """Raises: Dropped: by a rule."""
        pictures = [self._read(picture, "source unreadable") for picture in edit.pictures]
        target = self._read(edit.target, "target unreadable")
        alone = len(pictures) == 1
        if alone and other_aspect(pictures[0][1].size, target[1].size, self.max_aspect):
            raise Dropped("source and target over --max-aspect")
        mask = self._mask(edit, pictures[0][1], target[1], counts) if edit.mask is not None else None
        role, phrase = ("source", "picture") if alone else ("subject", "")
        references = [
            Reference(k, self._write(number, role if alone else f"ref{k}", data), phrase, role) for k, (data, _) in enumerate(pictures, 1)
        ]
        return Record(
            edit.instruction,
            tuple(references),
            self._write(number, "target", target[0]),
            caption=edit.caption or None,
            source_caption=edit.source_caption or None,
            task="edit" if alone else "subject",
            mask=None if mask is None else self._write(number, "mask", mask),
            session=edit.session,
            turn=edit.turn,
            id=f"{number:08d}" if edit.session is None else f"{edit.session}-{edit.turn}",
        )

    def _read(self, picture: str | bytes | None, rule: str, alpha: bool = False) -> tuple[bytes, Image]:
        """A picture as it was encoded, and upright."""
        try:
            if picture is None or (isinstance(picture, str) and self.layout.root is None):
                raise RecordError("there is none" if picture is None else f"{picture}: a data set of the hub has no folder; give --images")
            data = locate_file(picture, self.layout.root or Path()).read_bytes() if isinstance(picture, str) else picture
            return data, open_picture(data, alpha=alpha)
        except (RecordError, OSError) as error:
            raise Dropped(rule, str(error)) from error

    def _mask(self, edit: Edit, source: Image, target: Image, counts: Counter[str]) -> bytes:
        """The edit's mask at the target's size, as a PNG."""
        cut = self._read(edit.mask, "mask unreadable", alpha=True)[1]
        if other_aspect(cut.size, source.size, self.max_aspect):
            raise Dropped("mask of another aspect")
        mask = edit_mask(cut, source)
        if mask.size != target.size:
            mask = mask.resize(target.size, PILImage.Resampling.NEAREST)
        low, high = mask.getextrema()
        if not high:
            raise Dropped("mask empty")
        counts.update(name for name, holds in (("masks resized", cut.size != target.size), ("masks full", low == 255)) if holds)
        mask.save(file := io.BytesIO(), format="PNG")
        return file.getvalue()

    def _write(self, number: int, name: str, data: bytes) -> str:
        """A picture's file, its bytes as they are; the path relative to ``out``."""
        with PILImage.open(io.BytesIO(data), formats=FORMATS) as image:
            kind = str(image.format)
        path = self.out / "images" / f"{number // 1000:05d}" / f"{number:08d}-{name}.{ENDINGS.get(kind, kind.lower())}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path.relative_to(self.out).as_posix()


def edit_mask(cut: Image, source: Image) -> Image:
    """Grey, white where the picture may change, of a source with that region cut out, as MagicBrush has it.

    Transparent pixels are the region where there are any (as in DALL-E's masks). Else pure white ones are (the data set's card: "white
    region") that are not white in the source too, with the source's own white where these enclose it. A region's edge that is white in
    the source is lost.

    Args:
        cut: RGBA.
        source: upright RGB.
    """
    picture = np.asarray(cut)
    if picture[..., 3].min() < 255:
        return PILImage.fromarray(255 - picture[..., 3])
    white = (picture[..., :3] == 255).all(-1)
    painted = white & (np.asarray(source.resize(cut.size)) < 255).any(-1)
    return PILImage.fromarray((white & binary_fill_holes(painted)).astype(np.uint8) * 255)

"""Targets of several aspects: each batch holds pictures of one size (SDXL, Podell et al. 2023, section 2.3 and appendix I)."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import whole_file
from ..prompt import RecordError
from .images import picture_size
from .sources import Source


class Rows(NamedTuple):
    """Of every row, 3 bytes: its bucket [n] uint16, and how many references it has [n] uint8."""

    bucket: np.ndarray[Any, np.dtype[np.uint16]]
    references: np.ndarray[Any, np.dtype[np.uint8]]


@dataclass
class Buckets:
    """Sizes of nearly one area; a picture goes to the one whose aspect is nearest its own.

    Args:
        step: sides are multiples of it, in pixels; SDXL's are of 64.
        max_aspect: of the longer side to the shorter; SDXL has 4.
        table: ``.npz`` file in which the rows' buckets are kept, beside the data, say; else they are measured at each start.
    """

    step: int = 64
    max_aspect: float = 2.0
    table: str | None = None

    def __post_init__(self) -> None:
        if self.step < 1 or self.max_aspect < 1:
            raise ValueError(f"buckets: step and max_aspect must be 1 or more, not {self.step} and {self.max_aspect}")

    def sizes(self, side: int) -> list[tuple[int, int]]:
        """Height and width of all buckets, of at most the area of a square of this side, from the widest to the tallest.

        Raises:
            ValueError: the side is no multiple of the step.
        """
        if side % self.step:
            raise ValueError(f"buckets: target_size {side} is no multiple of step {self.step}")
        half = {(h, side * side // (h * self.step) * self.step) for h in range(self.step, side + 1, self.step)}
        kept = {(h, w) for h, w in half if w <= self.max_aspect * h}
        return sorted(kept | {(w, h) for h, w in kept}, key=lambda size: size[0] / size[1])

    def rows(self, source: Source, side: int) -> Rows:
        """The buckets of a source's rows: from the table, if it is of this source and these buckets, else measured, and kept there."""
        sizes = self.sizes(side)
        if self.table is None:
            return measure(source, sizes)
        key, path = hashlib.sha256(repr((source.fingerprint(), len(source), sizes)).encode()).hexdigest(), Path(self.table)
        if (found := _read(path, key)) is None:
            found = measure(source, sizes)
            _write(path, key, found)
        return found


def measure(source: Source, sizes: list[tuple[int, int]]) -> Rows:
    """The heads of all pictures are read. A row that cannot be used goes among the squares, and is found there."""
    aspects = np.log([h / w for h, w in sizes])
    bounds = (aspects[1:] + aspects[:-1]) / 2
    bucket, references = np.empty(len(source), np.uint16), np.zeros(len(source), np.uint8)
    for i in range(len(source)):
        width = height = 1
        try:
            record = source.record(i)
            references[i] = min(len(record.references), 255)
            if record.target is not None:
                width, height = picture_size(record.target, source.root)
        except RecordError:
            pass
        bucket[i] = np.searchsorted(bounds, np.log(height / width))
    return Rows(bucket, references)


def _read(path: Path, key: str) -> Rows | None:
    try:
        with np.load(path) as held:
            return Rows(held["bucket"], held["references"]) if str(held["key"]) == key else None
    except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(path: Path, key: str, rows: Rows) -> None:
    with whole_file(path) as file:
        np.savez(file, key=np.array(key), **rows._asdict())


def bucketed(rows: Rows, batch: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """An order in which every ``batch`` rows, of all ranks together, are of one bucket and, as far as they go, have equally many
    references: batches in random order, of rows in random order. What is left of a bucket is dropped."""
    order = rng.permutation(len(rows.bucket)).astype(np.int32 if len(rows.bucket) < 2**31 else np.int64)
    order = order[np.lexsort((rows.references[order], rows.bucket[order]))]
    counts = np.bincount(rows.bucket, minlength=1)
    whole = counts // batch * batch
    starts = np.cumsum(counts) - counts
    begins = np.concatenate([_begins(int(s), int(s + c), int(w), batch, rng) for s, c, w in zip(starts, counts, whole, strict=True)])
    return np.concatenate([order[b : b + batch] for b in rng.permutation(begins)])


def _begins(start: int, end: int, whole: int, batch: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Where the batches of a bucket begin; what is dropped lies at a random place, or it were always the rows with the most references."""
    gap = int(rng.integers(whole // batch + 1)) * batch
    begins = np.arange(start, start + whole, batch)
    return np.where(begins - start >= gap, begins + (end - start - whole), begins)

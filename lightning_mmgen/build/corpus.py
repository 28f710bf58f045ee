"""Captioned pictures by number, for corpora that do not fit into memory."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..data.sources import Lines, file_digest
from ..prompt import MARKER, RecordError

COLUMNS = ("image", "caption", "url", "score")


class Pair(NamedTuple):
    """A picture's path in the folder of the pictures, its caption on one line, where it is from, and a score of its quality."""

    image: str
    caption: str
    url: str = ""
    score: float | None = None


class Corpus(ABC):
    """Pairs by number."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, index: int) -> Any:
        """A row as it was written."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what the file holds."""

    def __getitem__(self, index: int) -> Pair:
        """Raises: RecordError: the row cannot be used."""
        try:
            return _pair(self.row(index))
        except (ValueError, RecursionError) as error:
            raise RecordError(f"row {index + 1}: {error}") from error


class JSONLCorpus(Corpus):
    """Rows {image, caption, url?, score?}, read when asked for, by their offsets.

    Args:
        path: the ``.jsonl`` file.
    """

    def __init__(self, path: Path) -> None:
        self.lines = Lines(path)

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> Any:
        return json.loads(self.lines[index])

    def fingerprint(self) -> str:
        return self.lines.digest


class ParquetCorpus(Corpus):
    """The same as columns of a parquet file; ``datasets`` maps them into memory from its cache.

    Args:
        path: the ``.parquet`` file.

    Raises:
        ValueError: no rows, or a column is missing.
    """

    def __init__(self, path: Path) -> None:
        import datasets

        self.path = path
        rows = datasets.Dataset.from_parquet(str(path))
        if missing := [name for name in COLUMNS[:2] if name not in rows.column_names]:
            raise ValueError(f"{path}: has no column {missing[0]!r}")
        if not len(rows):
            raise ValueError(f"{path}: holds no rows")
        self.rows = rows.select_columns([name for name in COLUMNS if name in rows.column_names])

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Any:
        return self.rows[index]

    def fingerprint(self) -> str:
        return file_digest(self.path)


def open_corpus(path: str) -> Corpus:
    """Raises: FileNotFoundError: no such file. ValueError: neither JSONL nor parquet, or without rows."""
    place = Path(path)
    if place.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path}: is neither .jsonl nor .parquet")
    if not place.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return JSONLCorpus(place) if place.suffix == ".jsonl" else ParquetCorpus(place)


def _pair(row: Any) -> Pair:
    if not isinstance(row, Mapping):
        raise ValueError("is not an object")
    image, caption, url, score = (row.get(name) for name in COLUMNS)
    if not isinstance(image, str) or not isinstance(caption, str):
        raise ValueError("needs the strings image and caption")
    if not isinstance(url, str | None) or not isinstance(score, int | float | None):
        raise ValueError("url must be a string, score a number")
    return Pair(image, " ".join(MARKER.sub(" ", caption).split()), url or "", score)

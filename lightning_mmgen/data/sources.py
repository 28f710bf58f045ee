"""Where records come from: a JSONL file beside its pictures, a parquet file or data set of ``datasets``, or the toybox."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..prompt import Picture, Record, RecordError, from_json
from .images import open_picture


class RowError(RecordError):
    """A bad row, by its place: ``file:row: reason``."""

    def __init__(self, where: str, row: int, reason: str) -> None:
        super().__init__(f"{where}:{row + 1}: {reason}")
        self.where, self.row, self.reason = where, row, reason


class Source(ABC):
    """Records by position. ``root`` is the folder that picture paths are relative to, and may not leave."""

    root: Path | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def record(self, index: int, epoch: int = 0) -> Record:
        """Record ``index``. A source that draws its records may draw others each ``epoch``.

        Raises:
            RowError: the row cannot be used.
        """

    def row(self, index: int, epoch: int = 0) -> int:
        """The row that record ``index`` is made of: the same number in every epoch."""
        return index

    def name(self, index: int, epoch: int = 0) -> str:
        """What messages call record ``index``."""
        return f"row {self.row(index, epoch) + 1}"

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what the source holds, for the run folder."""

    def with_people(self) -> list[int]:
        """The rows that have a person's box; bad rows are left out."""
        return [i for i in range(len(self)) if self._shows_people(i)]

    def _shows_people(self, index: int) -> bool:
        try:
            return any(box.kind == "person" for box in self.record(index).boxes)
        except RecordError:
            return False

    def __iter__(self) -> Iterator[Record]:
        return (self.record(i) for i in range(len(self)))


class Lines:
    """The lines of a file by number, read when asked for; memory holds an offset a line.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is empty.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        self.path, self.ends = path, line_ends(path)
        if not len(self.ends):
            raise ValueError(f"{path}: holds no rows")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return file_digest(self.path)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start, end = self.ends[index - 1] if index else 0, self.ends[index]
        with self.path.open("rb") as file:
            file.seek(int(start))
            return file.read(int(end - start))


def line_ends(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where each line of a file ends, in bytes from its beginning."""
    ends, at = [], 0
    with path.open("rb") as file:
        while block := file.read(1 << 17):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at + 1)
            at += len(block)
    if at and not (len(ends[-1]) and ends[-1][-1] == at):
        ends.append(np.array([at]))  # the last line lacks its end
    return np.concatenate(ends) if ends else np.empty(0, np.int64)


class JSONLSource(Source):
    """One JSON object a line; picture paths are relative to the file's folder. Lines are read when asked for, by their offsets.

    Args:
        path: the ``.jsonl`` file.
    """

    def __init__(self, path: str) -> None:
        self.lines = Lines(Path(path))
        self.root = self.lines.path.parent

    def __len__(self) -> int:
        return len(self.lines)

    def record(self, index: int, epoch: int = 0) -> Record:
        try:
            return from_json(json.loads(self.lines[index]))
        except (RecordError, ValueError, RecursionError) as error:
            raise RowError(self.lines.path.name, index, _one_line(error)) from error

    def with_people(self) -> list[int]:
        with self.lines.path.open("rb") as file:
            return [i for i, line in enumerate(file) if b"person" in line and self._shows_people(i)]  # only these are worth parsing

    def fingerprint(self) -> str:
        return self.lines.digest


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class DatasetSource(Source):
    """A parquet file, or a folder or hub name of the ``datasets`` library, whose columns are a record's fields.

    Args:
        path: a ``.parquet`` file, a folder of ``save_to_disk``, or a hub name.
        split: of a folder or a hub data set that has several.

    Raises:
        FileNotFoundError: a path that looks local and is not there.
        ValueError: a folder without that split.
    """

    def __init__(self, path: str, split: str = "train") -> None:
        import datasets

        self.path, local = path, Path(path)
        if path.endswith(".parquet"):
            if not local.is_file():
                raise FileNotFoundError(f"{path}: no such file")
            rows: Any = datasets.Dataset.from_parquet(path)
        elif local.is_dir():
            rows = datasets.load_from_disk(path)
            if isinstance(rows, datasets.DatasetDict):
                if split not in rows:
                    raise ValueError(f"{path}: no split {split!r}; there are {', '.join(rows)}")
                rows = rows[split]
        elif path.startswith((".", "/", "~")):
            raise FileNotFoundError(f"{path}: no such file or folder")
        else:
            rows = datasets.load_dataset(path, split=split)
        self.root = local.parent if local.is_file() else local if local.is_dir() else None
        self.rows = rows.with_format("arrow")  # pictures stay bytes, in lists too; they are decoded where all pictures are

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int, epoch: int = 0) -> Record:
        try:
            return from_json(self.rows[index].to_pylist()[0])
        except (RecordError, ValueError) as error:
            raise RowError(self.path, index, str(error)) from error

    def fingerprint(self) -> str:
        if not self.path.endswith(".parquet"):
            return str(self.rows._fingerprint)
        return file_digest(self.path)  # the library's own follows the file's path and time


class ToyboxSource(Source):
    """Records of the embedded world, drawn anew each epoch; record i of an epoch is a pure function of (seed, epoch, i).

    Args:
        tasks: weights of the task families (``lightning_mmgen.toybox.tasks.ALL_TASKS``).
        length: records an epoch.
        seed: of the draws.
        held_out: draw only combinations of toys that training never sees, and the same ones every epoch.
        swap_references: show other toys than the target holds; the control that must learn nothing from references.
        controls: give every record its edge, depth and sketch pictures.
        told: captions say what the instruction says in words, not what its references show.
    """

    def __init__(
        self,
        tasks: dict[str, float],
        length: int = 16384,
        seed: int = 0,
        held_out: bool = False,
        swap_references: bool = False,
        controls: bool = False,
        told: bool = False,
    ) -> None:
        from ..toybox.tasks import ALL_TASKS

        if unknown := sorted(set(tasks) - set(ALL_TASKS)):
            raise ValueError(f"unknown toybox task {unknown[0]!r}; there are {', '.join(ALL_TASKS)}")
        if min(tasks.values(), default=0) < 0 or not sum(tasks.values()):
            raise ValueError(f"toybox tasks need weights of 0 or more, not all 0: {tasks}")
        self.tasks, self.length, self.seed = tasks, length, seed
        self.held_out, self.swap_references, self.controls = held_out, swap_references, controls
        self.told = told

    def __len__(self) -> int:
        return self.length

    def record(self, index: int, epoch: int = 0) -> Record:
        from ..toybox.tasks import ALL_TASKS, ControlImages

        rng = np.random.default_rng((self.seed, 0 if self.held_out else epoch, index, int(self.held_out)))
        share = np.cumsum(list(self.tasks.values()))
        task = list(self.tasks)[int(np.searchsorted(share, rng.random() * share[-1], side="right"))]
        record = ALL_TASKS[task](rng, self.held_out)
        if self.swap_references:
            record = self._swapped(record, task, rng)
        if self.controls:
            record = replace(record, controls=ControlImages(record.extra["truth"].scene))
        if self.told:
            record = replace(record, caption=record.extra.get("told", record.caption))
        return replace(record, id=f"{task}-{index:05d}")

    def with_people(self) -> list[int]:
        return []  # there are none in this world

    def fingerprint(self) -> str:
        switches = (self.held_out, self.swap_references, self.controls, *(("told",) if self.told else ()))
        settings = (sorted(self.tasks.items()), self.length, self.seed, *switches)
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def _swapped(self, record: Record, task: str, rng: np.random.Generator) -> Record:
        """The record with each reference's picture taken from another record of its task."""
        from ..toybox.tasks import ALL_TASKS

        pictures: list[Picture] = []
        while len(pictures) < len(record.references):
            pictures += [r.image for r in ALL_TASKS[task](rng, self.held_out).references]
        references = tuple(replace(r, image=p) for r, p in zip(record.references, pictures, strict=False))
        return replace(record, references=references)


def open_source(path: str) -> Source:
    """The source for a path: ``.jsonl``, shards ``.tar``, ``.parquet``, a folder or a name of ``datasets``."""
    if path.endswith(".tar"):
        from .shards import WebDatasetSource

        return WebDatasetSource(path)
    return JSONLSource(path) if path.endswith((".jsonl", ".json")) else DatasetSource(path)


def write_jsonl(records: Iterable[Record], folder: str | Path) -> Path:
    """Write records as ``folder/records.jsonl``, their pictures beside it as ``folder/pictures/<row>_<field>.png``.

    Pictures in memory or in bytes are written as upright RGB; those given by a path keep it, relative to ``folder``.
    ``extra`` is not written.

    Returns:
        The path of ``records.jsonl``.

    Raises:
        RecordError: the bytes of a picture cannot be read.
    """
    folder = Path(folder)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)

    def save(row: int, picture: Picture, name: str) -> str:
        if isinstance(picture, str):
            return picture
        path = f"pictures/{row:06d}_{name}.png"
        open_picture(picture).save(folder / path)
        return path

    with (folder / "records.jsonl").open("w", encoding="utf-8") as file:
        for i, record in enumerate(records):
            written = replace(record, extra={}).map_pictures(partial(save, i))
            file.write(json.dumps(written.to_json(), ensure_ascii=False) + "\n")
    return folder / "records.jsonl"


def _one_line(error: Exception) -> str:
    return f"not JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error)

"""Data that are read from end to end, shard by shard: who reads which shard, in what order, and how a run goes on in the middle of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..prompt import Record, RecordError, from_json
from .sources import RowError


class Stream(ABC):
    """Records in shards, each read from its beginning. ``root`` is as in :class:`~lightning_mmgen.data.sources.Source`.

    Args:
        buffer: rows that a reader holds in memory and shuffles.
    """

    root: Path | None = None

    def __init__(self, buffer: int = 1000) -> None:
        if buffer < 1:
            raise ValueError(f"buffer must be 1 or more, not {buffer}")
        self.buffer = buffer

    @property
    @abstractmethod
    def shards(self) -> int:
        """How many there are."""

    @abstractmethod
    def read(self, shard: int, start: int = 0) -> Iterator[Record | RowError]:
        """The rows of a shard from row ``start`` on; one that cannot be used is its error."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what is read, by name, for the run folder."""

    def name(self, shard: int, row: int) -> str:
        """What messages call a row."""
        return f"shard {shard + 1}, row {row + 1}"


class DatasetStream(Stream):
    """A data set of the ``datasets`` library, streamed: by hub name, a folder that ``load_dataset`` reads, or parquet files.

    Args:
        path: a hub name or folder, or a pattern of ``.parquet`` files; each is a shard.
        split: of a data set that has several.
        buffer: see :class:`Stream`.

    Raises:
        FileNotFoundError: no such file.
    """

    def __init__(self, path: str, split: str = "train", buffer: int = 1000) -> None:
        import datasets

        super().__init__(buffer)
        self.path, self.split = path, split
        if path.endswith(".parquet"):
            rows: Any = datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
        else:
            rows = datasets.load_dataset(path, split=split, streaming=True)
        self.root = Path(path).parent if path.endswith(".parquet") and "://" not in path else Path(path) if Path(path).is_dir() else None
        self.rows = rows.with_format("arrow")  # pictures stay bytes

    @property
    def shards(self) -> int:
        return int(self.rows.num_shards)

    def name(self, shard: int, row: int) -> str:
        return f"{self.path}, {super().name(shard, row)}"

    def read(self, shard: int, start: int = 0) -> Iterator[Record | RowError]:
        part = self.rows.shard(num_shards=self.shards, index=shard)
        tables = (part.skip(start) if start else part).iter(batch_size=16)  # which leaves sharding over workers to us
        for row, values in enumerate((values for table in tables for values in table.to_pylist()), start):
            try:
                item: Record | RowError = from_json(values)
            except (RecordError, ValueError) as error:
                item = RowError(f"{self.path}, shard {shard + 1}", row, str(error))
            yield item

    def fingerprint(self) -> str:
        return f"{self.path} {self.split}"


class Mark(NamedTuple):
    """Where a lane stands: the block that begins at ``row`` of the ``place``-th shard of its ``epoch``, and how many of it are taken."""

    epoch: int = 0
    place: int = 0
    row: int = 0
    taken: int = 0


class StreamRow(NamedTuple):
    """A row of a stream, as one of an ``epoch``."""

    epoch: int
    shard: int
    row: int
    record: Record | RowError

    @property
    def number(self) -> int:
        """The same in every epoch."""
        return self.shard << 32 | self.row


class Lane:
    """One reader's share of a stream, without end: its shards in an order drawn anew each epoch, rows shuffled in blocks.

    A block is read whole, shuffled, and used up before the next: where a lane stands is told by four numbers, and what comes next is a
    function of them and the seed.

    Args:
        stream: the data.
        index, lanes: which reader of how many.
        seed: of all orders.
        mark: where to begin.

    Raises:
        ValueError: more lanes than shards, or no rows in those of this one.
    """

    def __init__(self, stream: Stream, index: int, lanes: int, seed: int, mark: Mark = Mark()) -> None:
        if stream.shards < lanes:
            raise ValueError(f"data.train has {stream.shards} shards, fewer than its {lanes} readers (ranks x workers)")
        self.shards = np.random.default_rng(seed).permutation(stream.shards)[index::lanes]
        self.stream, self.seed, self.index, self.mark = stream, seed, index, mark

    def __iter__(self) -> Iterator[tuple[StreamRow, Mark]]:
        """The rows, each with the mark that stands behind it."""
        mark = self.mark
        while True:
            rows, empty = self._epoch(mark), mark == Mark(mark.epoch)
            while block := list(islice(rows, self.stream.buffer)):
                begin, empty = block[0][1], False
                order = np.random.default_rng((self.seed, self.index, *begin[:3], 1)).permutation(len(block))
                for i in range(mark.taken, len(block)):
                    yield block[order[i]][0], begin._replace(taken=i + 1)
                mark = mark._replace(taken=0)
            if empty:
                raise ValueError(f"data.train: the shards of reader {self.index + 1} hold no rows")
            mark = Mark(mark.epoch + 1)

    def _epoch(self, mark: Mark) -> Iterator[tuple[StreamRow, Mark]]:
        """The rest of an epoch in the order of reading, each row with the mark that stands before it."""
        order, start = np.random.default_rng((self.seed, self.index, mark.epoch, 2)).permutation(self.shards), mark.row
        for place in range(mark.place, len(order)):
            shard = int(order[place])
            for row, record in enumerate(self.stream.read(shard, start), start):
                yield StreamRow(mark.epoch, shard, row, record), Mark(mark.epoch, place, row)
            start = 0

"""What a loader reads, and in which order: rows of one global order, sliced by rank, or lanes of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from ..batch import Batch
from ..prompt import RecordError
from .buckets import Rows, bucketed
from .cache import Caches
from .recipe import BadRow, Recipe, Sample, collate, sample_seed
from .sources import RowError, Source
from .streams import Lane, Mark, Stream, StreamRow


class Position(NamedTuple):
    """A place in the global order: which row of which epoch, and height and width of its target where that is no square."""

    index: int  # type: ignore[assignment]
    epoch: int
    size: tuple[int, int] | None = None


class RecordDataset(Dataset[Any]):
    """Samples by :class:`Position`. A bad row comes out as :class:`BadRow`, never as another row."""

    def __init__(self, source: Source, recipe: Recipe, seed: int) -> None:
        self.source, self.recipe, self.seed = source, recipe, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: Position) -> Any:
        try:
            record = self.source.record(position.index, position.epoch)
            record = record if record.id else replace(record, id=self.source.name(*position[:2]))
            return self.recipe(record, self.source.root, sample_seed(self.seed, position.epoch, position.index), position.size)
        except RowError as error:
            return BadRow(self.source.row(*position[:2]), str(error))
        except RecordError as error:
            return BadRow(self.source.row(*position[:2]), f"{self.source.name(*position[:2])}: {error}")


class StreamDataset(IterableDataset[Any]):
    """Batches of a stream, without end; every process of every rank reads a lane of its own.

    Attributes:
        batches, samples: that this rank has been handed, bad rows included.
        marks: where each of its lanes stands.
    """

    def __init__(self, stream: Stream, recipe: Recipe, seed: int, batch_size: int, workers: int, rank: int = 0, world: int = 1) -> None:
        self.stream, self.recipe, self.seed, self.batch_size = stream, recipe, seed, batch_size
        self.workers, self.rank, self.world, self.caches = max(workers, 1), rank, world, Caches()
        self.batches, self.samples, self.marks = 0, 0, [Mark()] * self.workers
        self.lane(0)

    def lane(self, index: int) -> Lane:
        """Raises: ValueError: more lanes than shards."""
        readers = self.world * self.workers
        return Lane(self.stream, self.rank * self.workers + index, readers, self.seed, self.marks[index])

    def __iter__(self) -> Iterator[tuple[Batch | None, list[BadRow], int, Mark]]:
        """Batches, their bad rows, which lane they are of, and its mark behind them."""
        if (worker := get_worker_info()) is not None:
            import fsspec.asyn

            fsspec.asyn.reset_lock()  # else a forked process may wait forever for its parent's thread
        index = (self.batches + (worker.id if worker else 0)) % self.workers  # the loader asks its processes in turn from the first on
        rows = iter(self.lane(index))
        while True:
            taken = list(islice(rows, self.batch_size))
            yield *collate([self.sample(row) for row, _ in taken], self.caches), index, taken[-1][1]

    def sample(self, row: StreamRow) -> Sample | BadRow:
        """A row, ready, or what is wrong with it."""
        name = self.stream.name(row.shard, row.row)
        if isinstance(row.record, RecordError):
            return BadRow(row.number, str(row.record))
        try:
            record = row.record if row.record.id else replace(row.record, id=name)
            return self.recipe(record, self.stream.root, sample_seed(self.seed, row.epoch, row.number))
        except RecordError as error:
            return BadRow(row.number, f"{name}: {error}")

    def take(self, index: int, mark: Mark) -> None:
        """Count a batch of this lane as handed over."""
        self.batches, self.samples, self.marks[index] = self.batches + 1, self.samples + self.batch_size, mark

    def state_dict(self) -> dict[str, Any]:
        """Of this rank."""
        return {"batches": self.batches, "samples": self.samples, "marks": [list(mark) for mark in self.marks]}

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Go on from the states of all ranks.

        Raises:
            ValueError: they are of other numbers of ranks or workers.
        """
        if (saved := (len(state), len(state[0]["marks"]))) != (self.world, self.workers):
            raise ValueError(
                f"a stream goes on with as many readers as before: {saved[0]} ranks x {saved[1]} workers, not {self.world} x {self.workers}"
            )
        own = state[self.rank]
        self.batches, self.samples, self.marks = own["batches"], own["samples"], [Mark(*mark) for mark in own["marks"]]


class OrderedSampler(Sampler[list[Position]]):
    """Batches of one global order, sliced by rank, from any position on.

    The order of an epoch is a permutation drawn from (seed, epoch); ranks take every ``world``-th place, so that the number of
    ranks may change between runs; the last, incomplete global batch of an epoch is dropped.

    Args:
        length: rows an epoch.
        batch_size: of one rank.
        seed: of the permutations; None keeps the rows in their order (evaluation, nothing dropped).
    """

    def __init__(self, length: int, batch_size: int, seed: int | None, rank: int = 0, world: int = 1) -> None:
        if seed is not None and length < batch_size * world:
            raise ValueError(f"the data have {length} rows, fewer than one batch of {batch_size * world}")
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.epoch, self.start = 0, 0  # where to begin; start in samples of the global order

    def __len__(self) -> int:
        whole = self.length // (self.batch_size * self.world)
        return whole if self.seed is not None else -(-self.length // (self.batch_size * self.world))

    def order(self, epoch: int) -> np.ndarray[Any, Any]:
        """The rows of an epoch in their global order: 4 bytes a row, up to 2^31 rows."""
        order = np.arange(self.length, dtype=np.int32 if self.length < 2**31 else np.int64)
        if self.seed is not None:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        return order

    def seek(self, epoch: int, start: int) -> tuple[int, int]:
        """Begin the next iteration after ``start`` samples of ``epoch``, or with the next epoch where less than a batch is left."""
        step = self.batch_size * self.world
        self.epoch, self.start = (epoch, start) if start + step <= self.length else (epoch + 1, 0)
        return self.epoch, self.start

    def __iter__(self) -> Iterator[list[Position]]:
        order, epoch, step = self.order(self.epoch), self.epoch, self.batch_size * self.world
        end = self.length if self.seed is None else self.length - step + 1  # the last whole batch begins before it
        for at in range(self.start, end, step):
            yield [Position(int(i), epoch, self.size_of(int(i))) for i in order[at : at + step][self.rank :: self.world]]

    def size_of(self, row: int) -> tuple[int, int] | None:
        """Of a row's target; None for squares."""
        return None


class BucketSampler(OrderedSampler):
    """The same, of batches whose targets are of one size; the order also depends on the global batch.

    Args:
        rows: of the source.
        sizes: of the buckets, height first.
    """

    def __init__(self, rows: Rows, sizes: list[tuple[int, int]], batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        step = batch_size * world
        whole = int((np.bincount(rows.bucket) // step * step).sum())
        if not whole:
            raise ValueError(f"no bucket of the data has rows for one batch of {step}; the fullest of {len(sizes)} lacks some")
        super().__init__(whole, batch_size, seed, rank, world)
        self.rows, self.sizes = rows, sizes

    def order(self, epoch: int) -> np.ndarray[Any, Any]:
        return bucketed(self.rows, self.batch_size * self.world, np.random.default_rng((self.seed or 0, epoch)))

    def size_of(self, row: int) -> tuple[int, int] | None:
        return self.sizes[self.rows.bucket[row]]

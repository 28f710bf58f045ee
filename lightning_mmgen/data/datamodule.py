"""The data path: source -> recipe -> sample -> batch, in an order that is a pure function of (seed, epoch, position)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from ..batch import Batch, Edit, Moments, pack
from ..folder import run_folder
from ..models.encoder import Encoder
from ..prompt import Record, RecordError
from .buckets import Buckets, Rows, bucketed
from .cache import Caches, open_caches, warn_of_misses
from .images import open_picture, pixels
from .masks import regions
from .sources import RowError, Source, ToyboxSource, open_source
from .streams import Lane, Mark, Stream, StreamRow


class Sample(NamedTuple):
    """One record, ready: pictures are [3, h, w] in [-1, 1]; ``seed`` is what its noise is drawn from; ``source`` [3, h, w] and ``mask``
    [1, h, w] in [0, 1], of the target's size, where it is an edit; ``regions``: where its boxes' phrases lie, phrase -> [s, s]; ``sizes``
    are SDXL's, of :class:`~lightning_mmgen.batch.Batch`, where targets are not all squares."""

    record: Record
    references: list[Tensor]
    target: Tensor
    seed: int
    source: Tensor | None = None
    mask: Tensor | None = None
    regions: dict[str, Tensor] | None = None
    sizes: tuple[int, ...] | None = None


class BadRow(NamedTuple):
    """A row that could not be used, and why; it leaves its place in the batch empty."""

    index: int  # type: ignore[assignment]
    reason: str


class Position(NamedTuple):
    """A place in the global order: which row of which epoch, and height and width of its target where that is no square."""

    index: int  # type: ignore[assignment]
    epoch: int
    size: tuple[int, int] | None = None


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """A 63-bit seed for one sample of one epoch."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest(), "big") >> 1


class Recipe:
    """Turns a record into a sample: opens its pictures, pads references to squares of ``reference_size``, fits the target.

    Args:
        reference_size: side in pixels of every reference, resized up or down (MUMU, section 4).
        target_size: side in pixels of the target; its centre is cropped to a square.
        encoder: whose limit of tokens a prompt may not pass; not checked if none is given.

    Attributes:
        regions: side of the maps of where a record's boxes lie; 0 for none.
    """

    def __init__(self, reference_size: int, target_size: int, encoder: Encoder | None = None) -> None:
        self.reference_size, self.target_size = reference_size, target_size
        self.tokenise = encoder.tokenise if encoder else None
        self.tokens = encoder.tokens_of(reference_size, reference_size) if encoder else 0
        self.regions = 0

    def compose(self, record: Record, root: Path | None, rng: np.random.Generator) -> Record:
        """The record as a prompt; a recipe that makes its prompts at train time does so here."""
        return record

    def __call__(self, record: Record, root: Path | None, seed: int, size: tuple[int, int] | None = None) -> Sample:
        """The sample; its target has this ``size``, height first, or is a square.

        Raises: RecordError: a picture cannot be read, there is no target, or the prompt is too long."""
        if record.target is None:
            raise RecordError("target is missing")
        record = self.compose(record, root, np.random.default_rng(seed))
        if self.tokenise:
            self.tokenise(record.prompt().instruction, [r.marker for r in record.references], [self.tokens] * len(record.references))
        references = [pixels(r.image, self.reference_size, root) for r in record.references]
        assert record.target is not None
        target = pixels(record.target, None, root)
        where = regions(record.boxes, (target.shape[2], target.shape[1]), self.regions, root) if self.regions else None
        fitted = crop(target, size or (self.target_size, self.target_size))
        sizes = None if size is None else sdxl_sizes((target.shape[1], target.shape[2]), size)
        sample = Sample(record, references, fitted, seed, regions=where, sizes=sizes)
        return self.finish(sample, target, root)

    def finish(self, sample: Sample, target: Tensor, root: Path | None) -> Sample:
        """What a recipe adds to a sample; ``target`` [3, h, w] is the whole picture."""
        return sample


def crop(picture: Tensor, size: Sequence[int]) -> Tensor:
    """The centre of a picture [3, h, w], as large as its aspect allows, as [3, *size], resized with antialiasing."""
    (_, h, w), (height, width) = picture.shape, size
    inner_h, inner_w = (h, round(h * width / height)) if h * width <= w * height else (round(w * height / width), w)
    inner_h, inner_w = max(inner_h, 1), max(inner_w, 1)
    top, left = (h - inner_h) // 2, (w - inner_w) // 2
    centre = picture[:, top : top + inner_h, left : left + inner_w]
    if (inner_h, inner_w) == (height, width):
        return centre.contiguous()
    return torch.nn.functional.interpolate(centre[None], (height, width), mode="bicubic", antialias=True)[0].clamp(-1, 1)


def crop_square(picture: Tensor, side: int) -> Tensor:
    """The centre of a picture [3, h, w] as [3, side, side], resized with antialiasing."""
    return crop(picture, (side, side))


def sdxl_sizes(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, ...]:
    """What SDXL is told of a centre crop (Podell et al. 2023, section 2.2): the picture's size, where the crop begins once the picture is
    resized to cover the target, and the target's size; each height first."""
    scale = max(size[0] / original[0], size[1] / original[1])
    top, left = ((round(o * scale) - s) // 2 for o, s in zip(original, size, strict=True))
    return (*original, max(top, 0), max(left, 0), *size)


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
            import fsspec

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


def collate(samples: list[Sample | BadRow], caches: Caches = Caches()) -> tuple[Batch | None, list[BadRow]]:
    """Samples to a batch, with what is known of its pictures, and the rows that had to be left out; no batch where nothing is left."""
    bad = [s for s in samples if isinstance(s, BadRow)]
    good = [s for s in samples if isinstance(s, Sample)]
    if not good:
        return None, bad
    prompts = [s.record.prompt() for s in good]
    batch = Batch(
        [prompt.instruction for prompt in prompts],
        [[r.marker for r in s.record.references] for s in good],
        pack([s.references for s in good], caches.patches),
        torch.stack([s.target for s in good]),
        [s.record.caption or "" for s in good],
        [s.record.id for s in good],
        torch.tensor([s.seed for s in good], dtype=torch.int64),
        [prompt.bare() for prompt in prompts],
        [[r.phrase for r in s.record.references] for s in good],
        _edits(good),
        regions=[s.regions or {} for s in good] if any(s.regions is not None for s in good) else None,
        sizes=None if good[0].sizes is None else torch.tensor([s.sizes for s in good]),
    )
    return batch._replace(moments=_moments(batch, caches)), bad


def _moments(batch: Batch, caches: Caches) -> Moments | None:
    """What the VAE makes of a batch; None where nothing of that is kept."""
    if caches.moments is None:
        return None
    return Moments(caches.all_moments(batch.target), None if batch.edit is None else caches.all_moments(batch.edit.source))


def _edits(samples: list[Sample]) -> Edit | None:
    """Sources and masks of a batch; None where no sample is an edit."""
    if all(s.source is None for s in samples):
        return None
    return Edit(
        torch.stack([s.target if s.source is None else s.source for s in samples]),
        torch.stack([torch.ones_like(s.target[:1]) if s.mask is None else s.mask for s in samples]),
        torch.tensor([-1 if s.source is None else s.record.turn or 0 for s in samples]),
        torch.tensor([s.source is not None for s in samples]),
    )


class MultimodalDataModule(L.LightningDataModule):
    """Multimodal instructions for training, and a fixed held-out set.

    Args:
        train: a source, the path of one, or ``toybox``: records of the embedded world that suit this data module; or a stream, which has
            no end: ``trainer.max_steps`` ends the run.
        held_out: a source for evaluation; none is allowed.
        target_size: side of the pictures to generate, in pixels.
        reference_size: side of the references, in pixels; by default what fills the encoder's token budget.
        batch_size: of one device.
        workers: loader processes.
        seed: of order and noise.
        bad_rows: share of rows that may be skipped before training stops.
        check: check every row's text and files before training, up to this many rows.
        regions: side of the maps of where a record's boxes, or their masks, lie in the target, for :class:`AttentionAlignment`; 0 for none.
        cache: folder of ``mmgen cache``, of what frozen networks make of the training pictures.
        buckets: targets of other aspects than squares, in training; off by default.
    """

    toybox: ClassVar[dict[str, Any]] = {"tasks": {"subject": 0.85, "caption": 0.15}}
    toybox_held_out: ClassVar[dict[str, Any]] = {"tasks": {"subject": 1.0}, "length": 256}
    """What :class:`ToyboxSource` is told where the data are ``toybox``."""
    collate: ClassVar[Callable[..., Any]] = staticmethod(collate)
    """Makes a batch of samples, and lists the rows that it had to leave out."""
    squares: ClassVar[bool] = False
    """Whether its recipe knows square targets only."""

    def __init__(
        self,
        train: Source | Stream | str,
        held_out: Source | str | None = None,
        target_size: int = 1024,
        reference_size: int | None = None,
        batch_size: int = 8,
        workers: int = 0,
        seed: int = 0,
        bad_rows: float = 0.01,
        check: int = 64,
        regions: int = 0,
        cache: str | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        super().__init__()
        if buckets is not None and (self.squares or isinstance(train, Stream)):
            raise ValueError(
                f"buckets: {'a stream has no places to sort' if isinstance(train, Stream) else type(self).__name__ + ' draws squares'}"
            )
        if buckets is not None and regions:
            raise ValueError("buckets: regions are of the square in the middle of a target; leave one of the two out")
        self.buckets = buckets
        self.train: Any = train if isinstance(train, Stream) else self._open(train, held_out=False)  # a Source or Stream
        self.held_out: Source | None = None if held_out is None else self._open(held_out, held_out=True)
        self.target_size, self.reference_size, self.batch_size, self.workers = target_size, reference_size, batch_size, workers
        self.seed, self.bad_rows, self.check, self.regions = seed, bad_rows, check, regions
        self.cache, self.caches = cache, Caches()
        self.bad: dict[int, str] = {}
        self._resume = (0, 0)  # epoch, samples of it that are consumed, over all ranks
        self._batch = 0  # samples of a global batch, in the checkpoint that the run goes on from
        self._sampler: OrderedSampler | None = None
        self._streamed: StreamDataset | None = None
        self._resume_stream: list[dict[str, Any]] | None = None

    def _open(self, source: Source | str, held_out: bool) -> Source:
        if source == "toybox":
            return ToyboxSource(**(self.toybox_held_out if held_out else self.toybox), held_out=held_out)
        return open_source(source) if isinstance(source, str) else source

    def make_recipe(self, reference_size: int, encoder: Encoder | None, held_out: bool) -> Recipe:
        """What turns records into samples; a data module of another task has another."""
        return Recipe(reference_size, self.target_size, encoder)

    def setup(self, stage: str) -> None:
        module = self.trainer.lightning_module if self.trainer else None
        if self.trainer:
            run_folder(self.trainer)  # here all ranks ask
        encoder = getattr(module, "encoder", None)
        if encoder is None and self.reference_size is None:
            raise ValueError("data.reference_size is needed where the model has no encoder to ask")
        side = self.reference_size or encoder.reference_size  # type: ignore[union-attr]
        self.recipe, self.held_out_recipe = (self.make_recipe(side, encoder, held_out) for held_out in (False, True))
        self.recipe.regions = self.held_out_recipe.regions = self.regions
        if not getattr(module, "references_in_prompt", True):
            self.recipe.tokens = self.held_out_recipe.tokens = 0  # the prompt is as long as its words
        if stage == "fit":
            self._first_rows()

    def _first_rows(self) -> None:
        """Fail before training where the first rows already show that it cannot succeed."""
        if isinstance(self.train, Stream):
            data = StreamDataset(self.train, self.recipe, self.seed, self.batch_size, 1)
            read = islice(enumerate(self.train.read(0)), self.check)
            items = [data.sample(StreamRow(0, 0, i, record)) for i, record in read]
        else:
            dataset = RecordDataset(self.train, self.recipe, self.seed)
            items = [dataset[Position(i, 0)] for i in range(min(self.check, len(self.train)))]
        bad = [item for item in items if isinstance(item, BadRow)]
        if items and len(bad) / len(items) > self.bad_rows and len(bad) > self.bad_rows * self._rows():
            raise RecordError(f"{len(bad)} of the first {len(items)} rows are bad (bad_rows: {self.bad_rows}); {bad[0].reason}")

    def _rows(self) -> int:
        """Of an epoch; a stream, which does not say, has so many before a share of them means anything."""
        return 1000 if isinstance(self.train, Stream) else len(self.train)

    def train_dataloader(self) -> DataLoader[Any]:
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if self.cache and self.trainer:
            self.caches = open_caches(self.cache, self.trainer.lightning_module, str(self.trainer.precision))
        if isinstance(self.train, Stream):
            return self._stream_loader(self.train, rank, world)
        self._sampler = self.sampler(rank, world)
        if self.buckets and self._resume[1] and self._batch != (now := self.batch_size * world):
            raise ValueError(f"buckets: a run goes on within an epoch with the same global batch, {self._batch}, not {now}")
        self._resume = self._sampler.seek(*self._resume)
        if self.trainer and self._resume[1]:  # the loop counts batches, which another number of devices makes larger or smaller
            self.trainer.fit_loop.epoch_loop.batch_progress.current.ready = self._resume[1] // (self.batch_size * world)
        return self._loader(self.train, self._sampler, self.recipe, self.caches)

    def sampler(self, rank: int = 0, world: int = 1) -> OrderedSampler:
        """The order of the training rows."""
        if self.buckets is None:
            return OrderedSampler(len(self.train), self.batch_size, self.seed, rank, world)
        rows, sizes = self.buckets.rows(self.train, self.target_size), self.buckets.sizes(self.target_size)
        return BucketSampler(rows, sizes, self.batch_size, self.seed, rank, world)

    def _stream_loader(self, stream: Stream, rank: int, world: int) -> DataLoader[Any]:
        data = StreamDataset(stream, self.recipe, self.seed, self.batch_size, self.workers, rank, world)
        data.caches = self.caches
        if (state := self._resume_stream) is not None:
            data.load_state_dict(state)
        self._streamed, self._resume_stream = data, None
        return DataLoader(self._streamed, batch_size=None, num_workers=self.workers, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if self.held_out is None:
            return []
        return self._loader(self.held_out, OrderedSampler(len(self.held_out), self.batch_size, None), self.held_out_recipe)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _loader(self, source: Source, sampler: OrderedSampler, recipe: Recipe, caches: Caches = Caches()) -> DataLoader[Any]:
        return DataLoader(
            RecordDataset(source, recipe, self.seed),
            batch_sampler=sampler,
            num_workers=self.workers,
            collate_fn=partial(self.collate, caches=caches),
            persistent_workers=self.workers > 0,
            generator=torch.Generator(),  # else each epoch takes a number from the process's own, which a resume would not
        )

    def held_out_records(self, count: int, start: int = 0) -> list[Record]:
        """``count`` held-out records, or as many as there are, from number ``start`` on, as prompts, their pictures opened.

        Raises:
            RecordError: a record cannot be used; the message names its row.
        """
        if self.held_out is None:
            return []
        return [self._opened(self.held_out, i) for i in range(start, min(start + count, len(self.held_out)))]

    def _opened(self, source: Source, index: int) -> Record:
        root = source.root
        try:
            record = source.record(index)
            record = self.held_out_recipe.compose(record, root, np.random.default_rng(sample_seed(self.seed, 0, index)))
            return replace(
                record,
                references=tuple(replace(r, image=open_picture(r.image, root)) for r in record.references),
                target=open_picture(record.target, root) if record.target is not None else None,
            )
        except RowError:
            raise
        except RecordError as error:
            raise RecordError(f"held-out {source.name(index)}: {error}") from error

    # -- bad rows, position ---------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        good, bad, *stand = batch
        if self.trainer and not self.trainer.training:
            if bad:
                raise RecordError(f"a held-out row is bad: {bad[0].reason}")
            return good
        if stand:
            assert self._streamed is not None
            self._streamed.take(*stand)
        elif self.trainer:
            self.advance()  # here, because Lightning calls no on_train_batch_start for a batch of bad rows alone
        if isinstance(good, Batch) and good.moments and (good.moments.target is None or (good.edit and good.moments.source is None)):
            warn_of_misses(str(self.cache), good.ids)
        for row in bad:
            self.bad[row.index] = row.reason
        if bad:
            self._report(bad)
        return good

    def _report(self, bad: list[BadRow]) -> None:
        if self.trainer and (folder := run_folder(self.trainer)):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"bad_rows.{self.trainer.global_rank}.jsonl").open("a") as file:
                file.writelines(json.dumps(row._asdict()) + "\n" for row in bad)
        epoch, consumed = self._resume
        rows = self._rows()
        seen = self._streamed.samples * self._streamed.world if self._streamed else epoch * rows + consumed
        if len(self.bad) > self.bad_rows * max(seen, rows):  # a mixture has more rows than places
            of = f"{seen} rows read" if self._streamed else f"{rows} rows"
            raise RecordError(f"{len(self.bad)} of {of} are bad, more than bad_rows={self.bad_rows}; last: {bad[-1].reason}")

    def advance(self, batches: int = 1) -> None:
        """Count ``batches`` global batches of the current epoch as consumed."""
        assert self._sampler is not None
        epoch, start = self._resume
        self._resume = self._sampler.seek(epoch, start + batches * self._sampler.batch_size * self._sampler.world)

    def state_dict(self) -> dict[str, Any]:
        state = {"epoch": self._resume[0], "consumed": self._resume[1], "seed": self.seed, "bad": dict(self.bad)}
        if self.buckets and self._sampler:
            state["batch"] = self._sampler.batch_size * self._sampler.world
        return state if self._streamed is None else {**state, "streams": of_all_ranks(self._streamed.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["seed"] != self.seed:
            raise ValueError(f"the checkpoint was made with data seed {state['seed']}, not {self.seed}")
        if ("streams" in state) != isinstance(self.train, Stream):
            raise ValueError("data.train is a stream in the checkpoint or here, but not in both")
        self._batch = state.get("batch", 0)
        self._resume, self.bad, self._resume_stream = (state["epoch"], state["consumed"]), dict(state["bad"]), state.get("streams")


def of_all_ranks(value: Any) -> list[Any]:
    """The value of every rank, in order; all of them ask."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    out: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(out, value)
    return out

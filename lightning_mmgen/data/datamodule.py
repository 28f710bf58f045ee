"""The data path: source -> recipe -> sample -> batch, in an order that is a pure function of (seed, epoch, position)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from ..batch import Batch
from ..folder import run_folder
from ..models.encoder import Encoder
from ..prompt import Record, RecordError
from ..ranks import of_all_ranks
from .buckets import Buckets
from .cache import Caches, open_caches, warn_of_misses
from .images import open_picture
from .order import BucketSampler, OrderedSampler, Position, RecordDataset, StreamDataset
from .recipe import BadRow, Recipe, collate, sample_seed
from .sources import RowError, Source, ToyboxSource, open_source
from .streams import Stream, StreamRow


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
        self.train: Any = train if isinstance(train, Stream) else self._open(train, self.toybox)  # a Source or Stream
        self.held_out: Source | None = None if held_out is None else self._open(held_out, self.toybox_held_out, held_out=True)
        self.target_size, self.reference_size, self.batch_size, self.workers = target_size, reference_size, batch_size, workers
        self.seed, self.bad_rows, self.check, self.regions = seed, bad_rows, check, regions
        self.cache, self.caches = cache, Caches()
        self.bad: dict[int, str] = {}
        self._resume = (0, 0)  # epoch, samples of it that are consumed, over all ranks
        self._batch = 0  # samples of a global batch, in the checkpoint that the run goes on from
        self._sampler: OrderedSampler | None = None
        self._streamed: StreamDataset | None = None
        self._resume_stream: list[dict[str, Any]] | None = None
        self._stand_in: Any = None

    @staticmethod
    def _open(source: Source | str, toybox: dict[str, Any], held_out: bool = False) -> Source:
        if source == "toybox":
            return ToyboxSource(**toybox, held_out=held_out)
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
        items = list(islice(self._in_order(), self.check))
        bad = [item for item in items if isinstance(item, BadRow)]
        if items and len(bad) / len(items) > self.bad_rows and len(bad) > self.bad_rows * self._rows():
            raise RecordError(f"{len(bad)} of the first {len(items)} rows are bad (bad_rows: {self.bad_rows}); {bad[0].reason}")

    def _in_order(self) -> Iterator[Any]:
        """Samples and bad rows as they lie in the source; of a stream, those of its first shard."""
        if isinstance(self.train, Stream):
            data = StreamDataset(self.train, self.recipe, self.seed, self.batch_size, self.workers, *self._place())
            return (data.sample(StreamRow(0, 0, i, record)) for i, record in enumerate(self.train.read(0)))
        dataset = self.rows()
        return (dataset[Position(i, 0)] for i in range(len(dataset)))

    def rows(self) -> RecordDataset:
        """The training rows, ready by position."""
        return RecordDataset(self.train, self.recipe, self.seed)

    def _place(self) -> tuple[int, int]:
        """Rank and number of ranks."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _rows(self) -> int:
        """Of an epoch; a stream, which does not say, has so many before a share of them means anything."""
        return 1000 if isinstance(self.train, Stream) else len(self.train)

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world = self._place()
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
        return self._loader(self.rows(), self._sampler, self.caches)

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
        rows = RecordDataset(self.held_out, self.held_out_recipe, self.seed)
        return self._loader(rows, OrderedSampler(len(rows), self.batch_size, None))

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _loader(self, rows: RecordDataset, sampler: OrderedSampler, caches: Caches = Caches()) -> DataLoader[Any]:
        return DataLoader(
            rows,
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
        return self.stand_in() if good is None and self.trainer and self.trainer.world_size > 1 else good

    def stand_in(self) -> Any:
        """A batch for a rank whose rows are all bad, or the others would wait for it for ever: the first good row, without its name, by
        which the module knows that its loss is zero.

        Raises: RecordError: there is none."""
        if self._stand_in is None:
            row = next((item for item in self._in_order() if not isinstance(item, BadRow)), None)
            if row is None:
                raise RecordError(f"all rows are bad; last: {list(self.bad.values())[-1]}")
            self._stand_in = self.collate([row])[0]._replace(ids=[])
        return self._stand_in

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
        for bad in of_all_ranks(self.bad):
            self.bad |= bad  # each rank has met its own
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

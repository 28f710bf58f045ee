"""The data path: source -> recipe -> sample -> batch, in an order that is a pure function of (seed, epoch, position)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..batch import Batch, Edit, pack
from ..models.encoder import Encoder
from ..prompt import Record, RecordError
from .images import open_picture, pixels
from .masks import regions
from .sources import RowError, Source, ToyboxSource, open_source


class Sample(NamedTuple):
    """One record, ready: pictures are [3, h, w] in [-1, 1]; ``seed`` is what its noise is drawn from; ``source`` [3, h, w] and ``mask``
    [1, h, w] in [0, 1], of the target's size, where it is an edit; ``regions``: where its boxes' phrases lie, phrase -> [s, s]."""

    record: Record
    references: list[Tensor]
    target: Tensor
    seed: int
    source: Tensor | None = None
    mask: Tensor | None = None
    regions: dict[str, Tensor] | None = None


class BadRow(NamedTuple):
    """A row that could not be used, and why; it leaves its place in the batch empty."""

    index: int  # type: ignore[assignment]
    reason: str


class Position(NamedTuple):
    """A place in the global order: which row of which epoch."""

    index: int  # type: ignore[assignment]
    epoch: int


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

    def __call__(self, record: Record, root: Path | None, seed: int) -> Sample:
        """Raises: RecordError: a picture cannot be read, there is no target, or the prompt is too long."""
        if record.target is None:
            raise RecordError("target is missing")
        record = self.compose(record, root, np.random.default_rng(seed))
        if self.tokenise:
            self.tokenise(record.prompt().instruction, [r.marker for r in record.references], [self.tokens] * len(record.references))
        references = [pixels(r.image, self.reference_size, root) for r in record.references]
        assert record.target is not None
        target = pixels(record.target, None, root)
        where = regions(record.boxes, (target.shape[2], target.shape[1]), self.regions, root) if self.regions else None
        return self.finish(Sample(record, references, crop_square(target, self.target_size), seed, regions=where), target, root)

    def finish(self, sample: Sample, target: Tensor, root: Path | None) -> Sample:
        """What a recipe adds to a sample; ``target`` [3, h, w] is the whole picture."""
        return sample


def crop_square(picture: Tensor, side: int) -> Tensor:
    """The centre of a picture [3, h, w] as [3, side, side], resized with antialiasing."""
    _, h, w = picture.shape
    s = min(h, w)
    centre = picture[:, (h - s) // 2 : (h - s) // 2 + s, (w - s) // 2 : (w - s) // 2 + s]
    if s == side:
        return centre.contiguous()
    return torch.nn.functional.interpolate(centre[None], (side, side), mode="bicubic", antialias=True)[0].clamp(-1, 1)


class RecordDataset(Dataset[Any]):
    """Samples by :class:`Position`. A bad row comes out as :class:`BadRow`, never as another row."""

    def __init__(self, source: Source, recipe: Recipe, seed: int) -> None:
        self.source, self.recipe, self.seed = source, recipe, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: Position) -> Any:
        try:
            record = self.source.record(position.index, position.epoch)
            record = record if record.id else replace(record, id=self.source.name(*position))
            return self.recipe(record, self.source.root, sample_seed(self.seed, position.epoch, position.index))
        except RowError as error:
            return BadRow(self.source.row(*position), str(error))
        except RecordError as error:
            return BadRow(self.source.row(*position), f"{self.source.name(*position)}: {error}")


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

    def order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The rows of an epoch in their global order."""
        if self.seed is None:
            return np.arange(self.length)
        return np.random.default_rng((self.seed, epoch)).permutation(self.length)

    def seek(self, epoch: int, start: int) -> tuple[int, int]:
        """Begin the next iteration after ``start`` samples of ``epoch``, or with the next epoch where less than a batch is left."""
        step = self.batch_size * self.world
        self.epoch, self.start = (epoch, start) if start + step <= self.length else (epoch + 1, 0)
        return self.epoch, self.start

    def __iter__(self) -> Iterator[list[Position]]:
        order, epoch, step = self.order(self.epoch), self.epoch, self.batch_size * self.world
        end = self.length if self.seed is None else self.length - step + 1  # the last whole batch begins before it
        for at in range(self.start, end, step):
            yield [Position(int(i), epoch) for i in order[at : at + step][self.rank :: self.world]]


def collate(samples: list[Sample | BadRow]) -> tuple[Batch | None, list[BadRow]]:
    """Samples to a batch, and the rows that had to be left out; no batch where nothing is left."""
    bad = [s for s in samples if isinstance(s, BadRow)]
    good = [s for s in samples if isinstance(s, Sample)]
    if not good:
        return None, bad
    prompts = [s.record.prompt() for s in good]
    batch = Batch(
        [prompt.instruction for prompt in prompts],
        [[r.marker for r in s.record.references] for s in good],
        pack([s.references for s in good]),
        torch.stack([s.target for s in good]),
        [s.record.caption or "" for s in good],
        [s.record.id for s in good],
        torch.tensor([s.seed for s in good], dtype=torch.int64),
        [prompt.bare() for prompt in prompts],
        [[r.phrase for r in s.record.references] for s in good],
        _edits(good),
        [s.regions or {} for s in good] if any(s.regions is not None for s in good) else None,
    )
    return batch, bad


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
        train: a source, the path of one, or ``toybox``: records of the embedded world that suit this data module.
        held_out: the same for evaluation; none is allowed.
        target_size: side of the pictures to generate, in pixels.
        reference_size: side of the references, in pixels; by default what fills the encoder's token budget.
        batch_size: of one device.
        workers: loader processes.
        seed: of order and noise.
        bad_rows: share of rows that may be skipped before training stops.
        check: check every row's text and files before training, up to this many rows.
        regions: side of the maps of where a record's boxes, or their masks, lie in the target, for :class:`AttentionAlignment`; 0 for none.
    """

    toybox: ClassVar[dict[str, Any]] = {"tasks": {"subject": 0.85, "caption": 0.15}}
    toybox_held_out: ClassVar[dict[str, Any]] = {"tasks": {"subject": 1.0}, "length": 256}
    """What :class:`ToyboxSource` is told where the data are ``toybox``."""
    collate: ClassVar[Callable[..., Any]] = staticmethod(collate)
    """Makes a batch of samples, and lists the rows that it had to leave out."""

    def __init__(
        self,
        train: Source | str,
        held_out: Source | str | None = None,
        target_size: int = 1024,
        reference_size: int | None = None,
        batch_size: int = 8,
        workers: int = 0,
        seed: int = 0,
        bad_rows: float = 0.01,
        check: int = 64,
        regions: int = 0,
    ) -> None:
        super().__init__()
        self.train: Source = self._open(train, held_out=False)
        self.held_out: Source | None = None if held_out is None else self._open(held_out, held_out=True)
        self.target_size, self.reference_size, self.batch_size, self.workers = target_size, reference_size, batch_size, workers
        self.seed, self.bad_rows, self.check, self.regions = seed, bad_rows, check, regions
        self.bad: dict[int, str] = {}
        self._resume = (0, 0)  # epoch, samples of it that are consumed, over all ranks
        self._sampler: OrderedSampler | None = None

    def _open(self, source: Source | str, held_out: bool) -> Source:
        if source == "toybox":
            return ToyboxSource(**(self.toybox_held_out if held_out else self.toybox), held_out=held_out)
        return open_source(source) if isinstance(source, str) else source

    def make_recipe(self, reference_size: int, encoder: Encoder | None, held_out: bool) -> Recipe:
        """What turns records into samples; a data module of another task has another."""
        return Recipe(reference_size, self.target_size, encoder)

    def setup(self, stage: str) -> None:
        module = self.trainer.lightning_module if self.trainer else None
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
        bad = []
        rows = min(self.check, len(self.train))
        for i in range(rows):
            item = RecordDataset(self.train, self.recipe, self.seed)[Position(i, 0)]
            if isinstance(item, BadRow):
                bad.append(item)
        if rows and len(bad) / rows > self.bad_rows and len(bad) > self.bad_rows * len(self.train):
            raise RecordError(f"{len(bad)} of the first {rows} rows are bad (bad_rows: {self.bad_rows}); {bad[0].reason}")

    def train_dataloader(self) -> DataLoader[Any]:
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        self._sampler = OrderedSampler(len(self.train), self.batch_size, self.seed, rank, world)
        self._resume = self._sampler.seek(*self._resume)
        return self._loader(self.train, self._sampler, self.recipe)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if self.held_out is None:
            return []
        return self._loader(self.held_out, OrderedSampler(len(self.held_out), self.batch_size, None), self.held_out_recipe)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _loader(self, source: Source, sampler: OrderedSampler, recipe: Recipe) -> DataLoader[Any]:
        return DataLoader(
            RecordDataset(source, recipe, self.seed),
            batch_sampler=sampler,
            num_workers=self.workers,
            collate_fn=self.collate,
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
        good, bad = batch
        if self.trainer and not self.trainer.training:
            if bad:
                raise RecordError(f"a held-out row is bad: {bad[0].reason}")
            return good
        if self.trainer:
            self.advance()  # here, because Lightning calls no on_train_batch_start for a batch of bad rows alone
        for row in bad:
            self.bad[row.index] = row.reason
        if bad:
            self._report(bad)
        return good

    def _report(self, bad: list[BadRow]) -> None:
        if self.trainer and self.trainer.log_dir:
            folder = Path(self.trainer.log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"bad_rows.{self.trainer.global_rank}.jsonl").open("a") as file:
                file.writelines(json.dumps(row._asdict()) + "\n" for row in bad)
        epoch, consumed = self._resume
        if len(self.bad) > self.bad_rows * max(epoch * len(self.train) + consumed, len(self.train)):  # a mixture has more rows than places
            raise RecordError(
                f"{len(self.bad)} of {len(self.train)} rows are bad, more than bad_rows={self.bad_rows}; last: {bad[-1].reason}"
            )

    def advance(self, batches: int = 1) -> None:
        """Count ``batches`` global batches of the current epoch as consumed."""
        assert self._sampler is not None
        epoch, start = self._resume
        self._resume = self._sampler.seek(epoch, start + batches * self._sampler.batch_size * self._sampler.world)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._resume[0], "consumed": self._resume[1], "seed": self.seed, "bad": dict(self.bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["seed"] != self.seed:
            raise ValueError(f"the checkpoint was made with data seed {state['seed']}, not {self.seed}")
        self._resume, self.bad = (state["epoch"], state["consumed"]), dict(state["bad"])

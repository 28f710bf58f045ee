"""From a record to a sample, and from samples to a batch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, Edit, Moments, pack
from ..models.encoder import Encoder
from ..prompt import Record, RecordError
from .cache import Caches
from .images import crop, pixels, sdxl_sizes
from .masks import regions


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
        descriptions=[s.record.description or s.record.caption or "" for s in good],
        foils=[s.record.foil or "" for s in good],
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

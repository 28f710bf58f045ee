"""Pairs of training rows that differ in what a model is to learn, side by side in one batch, with the same noise."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from ..batch import Batch
from .cache import Caches
from .datamodule import MultimodalDataModule
from .order import Position, RecordDataset
from .recipe import BadRow, Sample, collate
from .sources import Source


class Pair(NamedTuple):
    """Row number i of both sources; they share a seed: noise, timestep, and what is left out of their prompts."""

    first: Sample
    second: Sample


class PairedDataset(RecordDataset):
    """Pairs by :class:`~lightning_mmgen.data.order.Position`; a bad row of either source is a bad pair."""

    def __init__(self, first: RecordDataset, second: RecordDataset) -> None:
        super().__init__(first.source, first.recipe, first.seed)
        self.second = second

    def __getitem__(self, position: Position) -> Pair | BadRow:
        pair = super().__getitem__(position), self.second[position]
        return next((row for row in pair if isinstance(row, BadRow)), None) or Pair(*pair)


def collate_pairs(rows: list[Any], caches: Caches = Caches()) -> tuple[Batch | None, list[BadRow]]:
    """A batch whose second half are the partners of its first, in their order, and the bad pairs; rows that are no pairs (held-out ones) as
    :func:`~lightning_mmgen.data.recipe.collate` has them."""
    pairs = [row for row in rows if isinstance(row, Pair)]
    rest = [row for row in rows if not isinstance(row, Pair)]
    return collate([*(pair.first for pair in pairs), *(pair.second for pair in pairs), *rest], caches)


class PairedDataModule(MultimodalDataModule):
    """Two sources, row for row: the same content in two styles, say, or two values of what a caption names. For
    :class:`~lightning_mmgen.callbacks.PairDifference`.

    Args:
        train: a source or its path; ``toybox``: captions that measure (``measured``).
        other: a source or its path, as long: row i is the partner of row i of ``train``; ``toybox``: the same scenes with every measure
            mirrored (``measured twin``).
        held_out: a source for evaluation; none is allowed.
        batch_size: pairs of one device; a batch has twice as many samples.
        settings: of :class:`~lightning_mmgen.data.datamodule.MultimodalDataModule`.

    Raises:
        ValueError: the sources differ in length.
    """

    toybox: ClassVar[dict[str, Any]] = {"tasks": {"measured": 1.0}}
    toybox_other: ClassVar[dict[str, Any]] = {"tasks": {"measured twin": 1.0}}
    toybox_held_out: ClassVar[dict[str, Any]] = {"tasks": {"caption": 1.0}, "length": 256}
    collate: ClassVar = staticmethod(collate_pairs)

    def __init__(self, train: Source | str, other: Source | str, held_out: Source | str | None = None, **settings: Any) -> None:
        super().__init__(train, held_out, **settings)
        self.other = self._open(other, self.toybox_other)
        if len(self.other) != len(self.train):
            raise ValueError(f"pairs need sources of one length, not {len(self.train)} rows (train) and {len(self.other)} (other)")

    def rows(self) -> RecordDataset:
        return PairedDataset(super().rows(), RecordDataset(self.other, self.recipe, self.seed))

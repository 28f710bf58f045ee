"""Edits: a source picture, an instruction, and the picture after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..models.encoder import Encoder
from ..prompt import Record, RecordError, Reference
from .datamodule import MultimodalDataModule
from .images import crop, other_aspect, pixels
from .masks import difference_mask
from .recipe import Recipe, Sample
from .sources import Source
from .streams import Stream


class EditRecipe(Recipe):
    """A record with a reference of the role ``source`` becomes an edit: the source beside the target, and the mask of what may change.
    Records of other tasks stay as they are.

    Args:
        max_aspect: how far the aspects (width / height) of source and target may lie apart, as a ratio.
        threshold, dilate, min_area: of :func:`~lightning_mmgen.data.masks.difference_mask`, for an edit without a mask.
        show_mask: the prompt shows the mask of an edit that has one, as its last reference (masked editing).
    """

    def __init__(
        self,
        reference_size: int,
        target_size: int,
        encoder: Encoder | None = None,
        max_aspect: float = 1.02,
        threshold: float = 0.1,
        dilate: int = 2,
        min_area: int = 16,
        show_mask: bool = False,
    ) -> None:
        super().__init__(reference_size, target_size, encoder)
        self.max_aspect, self.threshold, self.dilate, self.min_area = max_aspect, threshold, dilate, min_area
        self.show_mask = show_mask

    def compose(self, record: Record, root: Path | None, rng: np.random.Generator) -> Record:
        if not self.show_mask or record.mask is None or all(r.role != "source" for r in record.references):
            return record
        k = max(r.marker for r in record.references) + 1
        mask = Reference(k, record.mask, "mask", "mask")
        return replace(record, instruction=f"{record.instruction}, inside the [ref#{k}] mask", references=(*record.references, mask))

    def finish(self, sample: Sample, target: Tensor, root: Path | None) -> Sample:
        """Raises: RecordError: an edit without its source; source and target of different aspects; a mask of another size, or empty."""
        record = sample.record
        if record.task != "edit" and all(r.role != "source" for r in record.references):
            return sample
        before = pixels(source_of(record).image, None, root)
        size, after = f"{before.shape[2]} x {before.shape[1]}", f"{target.shape[2]} x {target.shape[1]}"
        if other_aspect((before.shape[2], before.shape[1]), (target.shape[2], target.shape[1]), self.max_aspect):
            raise RecordError(f"source is {size}, target {after}: another aspect")
        side = sample.target.shape[-2:]
        source = crop(before, side)
        if record.mask is None:
            mask = difference_mask(source, sample.target, self.threshold, self.dilate, self.min_area)
            if not mask.any():
                raise RecordError("source and target are alike: there is no edit")
            return sample._replace(source=source, mask=mask)
        mask = (pixels(record.mask, None, root).mean(0, keepdim=True) + 1) / 2
        if (given := f"{mask.shape[2]} x {mask.shape[1]}") not in (size, after):
            raise RecordError(f"mask is {given}, source {size}")
        if not mask.any():
            raise RecordError("mask is empty: the edit may change nothing")
        return sample._replace(source=source, mask=crop(mask, side).clamp(0, 1))


def source_of(record: Record) -> Reference:
    """The picture that an edit starts from.

    Raises:
        RecordError: the record has none, or several.
    """
    sources = [r for r in record.references if r.role == "source"]
    if len(sources) != 1:
        raise RecordError(f"an edit has one reference of the role 'source', not {len(sources)}")
    return sources[0]


class EditDataModule(MultimodalDataModule):
    """Edits for training and evaluation, mixed with other records or alone.

    Args:
        train, held_out: sources, or paths of them; ``toybox`` is the embedded world.
        max_aspect, threshold, dilate, min_area, show_mask: see :class:`EditRecipe`.
        settings: of :class:`~lightning_mmgen.data.datamodule.MultimodalDataModule`.
    """

    toybox: ClassVar = {"tasks": {"edit turn": 0.85, "caption": 0.15}}
    toybox_held_out: ClassVar = {"tasks": {"edit": 1.0}, "length": 256}

    def __init__(
        self,
        train: Source | Stream | str,
        held_out: Source | str | None = None,
        max_aspect: float = 1.02,
        threshold: float = 0.1,
        dilate: int = 2,
        min_area: int = 16,
        show_mask: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(train, held_out, **settings)
        self.editing = (max_aspect, threshold, dilate, min_area, show_mask)

    def make_recipe(self, reference_size: int, encoder: Encoder | None, held_out: bool) -> Recipe:
        return EditRecipe(reference_size, self.target_size, encoder, *self.editing)

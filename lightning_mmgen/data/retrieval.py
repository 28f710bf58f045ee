"""Retrieval-augmented prompts: a cluster's neighbours as context (Instruct-Imagen, Hu et al. 2024, section 3.2)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..models.encoder import Encoder
from ..prompt import MARKER, Record, RecordError, Reference, in_context
from .datamodule import MultimodalDataModule
from .images import locate_file
from .recipe import Recipe
from .sources import Source
from .streams import Stream


class RetrievalRecipe(Recipe):
    """A record with references of the role ``neighbour`` becomes a prompt with some of them, drawn at random, before its caption.

    Args:
        context: neighbours a prompt.
        swap_target: any pair of the cluster may be the target, not the record's own alone.
    """

    def __init__(
        self, reference_size: int, target_size: int, encoder: Encoder | None = None, context: int = 3, swap_target: bool = False
    ) -> None:
        super().__init__(reference_size, target_size, encoder)
        if context < 1:
            raise ValueError(f"context must be 1 or more, not {context}")
        self.context, self.swap_target = context, swap_target

    def compose(self, record: Record, root: Path | None, rng: np.random.Generator) -> Record:
        """Raises: RecordError: too few neighbours, or a pair without a caption or picture, drawn or not."""
        neighbours = [r for r in record.references if r.role == "neighbour"]
        if len(neighbours) < self.context:
            raise RecordError(f"the cluster has {len(neighbours)} neighbours, fewer than context={self.context}")
        for picture in record.pictures():
            if isinstance(picture, str):
                locate_file(picture, root or Path.cwd())
        if self.swap_target and (k := int(rng.integers(len(neighbours) + 1))) < len(neighbours):
            assert record.target is not None
            own = Reference(0, record.target, record.caption or "", "neighbour")
            image, caption = neighbours[k].image, neighbours[k].phrase
            record = replace(record, target=image, caption=caption, description=None, foil=None, boxes=(), controls={}, mask=None, extra={})
            neighbours[k] = own
        drawn = [neighbours[i] for i in rng.choice(len(neighbours), self.context, replace=False)]
        context = tuple(replace(r, marker=k + 1, phrase=plain(r.phrase)) for k, r in enumerate(drawn))
        return replace(record, instruction=in_context(context, plain(record.caption)), references=context)


def plain(caption: str | None) -> str:
    """A caption without markers and without its full stop.

    Raises:
        RecordError: nothing is left.
    """
    if not (words := " ".join(MARKER.sub(" ", caption or "").split()).rstrip(". ")):
        raise RecordError("a pair of the cluster has no caption")
    return words


class RetrievalDataModule(MultimodalDataModule):
    """Clusters of captioned pictures (``mmgen build clusters``) as prompts: neighbours, then the caption of what to draw. The paper's
    dropout is the module's ``condition_dropout: {both: 0.1, references: 0.1}``. The held-out set keeps its targets.

    Args:
        train, held_out: sources, or paths of them; ``toybox`` is the embedded world.
        context, swap_target: see :class:`RetrievalRecipe`.
        settings: of :class:`~lightning_mmgen.data.datamodule.MultimodalDataModule`.
    """

    toybox: ClassVar = {"tasks": {"retrieval": 1.0}}
    toybox_held_out: ClassVar = {"tasks": {"retrieval": 1.0}, "length": 256}

    def __init__(
        self,
        train: Source | Stream | str,
        held_out: Source | str | None = None,
        context: int = 3,
        swap_target: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(train, held_out, **settings)
        self.context, self.swap_target = context, swap_target

    def make_recipe(self, reference_size: int, encoder: Encoder | None, held_out: bool) -> Recipe:
        return RetrievalRecipe(reference_size, self.target_size, encoder, self.context, self.swap_target and not held_out)

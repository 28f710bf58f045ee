"""Pictures rated as ImagenHub rates them, the oracle in the raters' place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from lightning_mmgen.callbacks import sample

from lightning_mmgen.metrics.following import toybox_rating
from lightning_mmgen.metrics.ratings import Ratings
from lightning_mmgen.module import MultimodalDiffusion
from lightning_mmgen.pipeline import MultimodalPipeline, to_pil
from lightning_mmgen.prompt import Record


class Overall(NamedTuple):
    """Means over pictures: SC, PQ, O as Instruct-Imagen has it and as ImagenHub has it, and the share of pictures with SC = 1."""

    sc: float
    pq: float
    o: float
    o_imagenhub: float
    accuracy: float


def rate(module: MultimodalDiffusion, wanted: list[Record], seed: int) -> list[tuple[float, float]]:
    """SC and PQ of a picture for each record."""
    drawn = sample(MultimodalPipeline.of(module), wanted, seed=seed, side=64)
    return [toybox_rating(np.asarray(image), record.extra["truth"]) for image, record in zip(to_pil(drawn), wanted, strict=True)]


def overall(scores: Sequence[Sequence[float]]) -> Overall:
    """Of SC and PQ of each picture."""
    metric = Ratings()
    sc, pq = torch.tensor(scores).T
    metric.update(sc, pq)
    values = metric.compute()
    return Overall(*(float(values[k]) for k in ("sc", "pq", "o_instruct_imagen", "o_imagenhub", "accuracy")))

"""CLIP score of held-out instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_mmgen.metrics.clip import CLIPSimilarity
from lightning_mmgen.prompt import Record

from .scoring import PictureEvaluation


class CLIPScoreEvaluation(PictureEvaluation):
    """CLIP-T of the held-out pictures with their plain captions; records without a caption are left out.

    Args:
        model: any CLIP of ``transformers`` by name or folder.
        look: see :class:`PictureEvaluation`.
    """

    name = "clip_score"
    nothing = "no held-out record has a caption"

    def __init__(self, model: str = "toybox/clip", **look: Any) -> None:
        super().__init__(**look)
        self.model = model
        self.metric: CLIPSimilarity | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.metric is None:
            with isolate_rng():
                self.metric = CLIPSimilarity(self.model)

    def concerns(self, record: Record) -> bool:
        return bool((record.caption or "").strip())

    def score(self, trainer: Trainer, records: Sequence[Record], pictures: Tensor) -> dict[str, Tensor]:
        assert self.metric is not None
        return {"clip_t": self.metric.to(pictures.device).score(pictures, [(r.caption or "").strip() for r in records])}

"""Instruction following and object consistency on the toybox's held-out instructions, before and after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning import Trainer
from torch import Tensor

from lightning_mmgen.metrics.following import SCORES, ToyboxFollowing
from lightning_mmgen.prompt import Record

from .scoring import PictureEvaluation


class FollowingEvaluation(PictureEvaluation):
    """Lets the oracle read the pictures of held-out toybox instructions; arguments as of :class:`PictureEvaluation`."""

    name = "following"
    titles = {
        "following": "instruction following",
        "strict": "all conditions met",
        "consistency": "object consistency",
        "success": "edits brought about",
    }

    def score(self, trainer: Trainer, records: Sequence[Record], pictures: Tensor) -> dict[str, Tensor]:
        if any("truth" not in r.extra for r in records):
            raise ValueError("FollowingEvaluation reads toybox pictures only: data.held_out must be a ToyboxSource")
        rows = ToyboxFollowing().score(pictures, [r.extra["truth"] for r in records])
        return {name: torch.tensor([row.get(name, torch.nan) for row in rows]) for name in SCORES}

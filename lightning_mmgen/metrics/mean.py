"""What metrics with one score a picture share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class PictureMean(Metric):
    """The mean of a score over all pictures of all processes; nan of none.

    Every such metric has one form: ``score(pictures, ...)`` gives the score of each picture, and ``update`` takes the same and adds them to
    the mean. Pictures are [b, 3, H, W] in [-1, 1]. The score is nan where a picture has none (nothing of it lies outside an edit mask, its
    record has no reference), and such a picture does not count. One that is not finite itself makes the mean nan.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @abstractmethod
    def score(self, pictures: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The score of each picture, [b]; nan where it has none."""

    def update(self, pictures: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add pictures; arguments as of :meth:`score`."""
        scores = self.score(pictures, *args, **kwargs)
        broken = ~pictures.isfinite().flatten(1).all(1).to(scores.device)
        self.include(scores.where(~broken, torch.nan)[broken | ~scores.isnan()])

    def include(self, scores: Tensor) -> None:
        """The scores of some pictures, [b]."""
        self.total += scores.double().sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """The mean over all pictures."""
        return (self.total / self.count).float()

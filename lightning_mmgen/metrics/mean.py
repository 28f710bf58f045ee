"""What metrics with one score a picture share."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class PictureMean(Metric):
    """The mean of a score over all pictures of all processes; nan of none."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def include(self, scores: Tensor) -> None:
        """The scores of some pictures, [b]."""
        self.total += scores.double().sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """The mean over all pictures."""
        return (self.total / self.count).float()

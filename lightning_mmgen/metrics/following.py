"""Instruction following and object consistency on the toybox, read by its oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from ..toybox.oracle import score
from ..toybox.tasks import Truth


class ToyboxFollowing(Metric):
    """Scores generated toybox pictures.

    ``compute`` gives ``following`` (share of an instruction's conditions that hold, averaged over instructions), ``strict`` (share of
    instructions with all of them), ``consistency`` (of every toy that a reference shows), each with the half-width of its 95 %
    confidence interval (bootstrap over pictures) under ``<name>_ci``.
    """

    full_state_update = False
    following: list[Tensor]
    strict: list[Tensor]
    consistency: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("following", "strict", "consistency"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, pictures: Tensor, truths: Sequence[Truth]) -> None:
        """Pictures [b, 3, 64, 64] in [-1, 1], and what each was asked to show."""
        arrays = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        scores = [score(a, t) for a, t in zip(arrays, truths, strict=True)]
        self.following.append(torch.tensor([s.following for s in scores]))
        self.strict.append(torch.tensor([float(s.strict) for s in scores]))
        self.consistency.append(torch.tensor([float(np.mean(s.consistency)) for s in scores if s.consistency]))

    def compute(self) -> dict[str, Tensor]:
        """The three scores and their intervals; a score without a picture is left out."""
        out = {}
        for name in ("following", "strict", "consistency"):
            values = dim_zero_cat(getattr(self, name))
            if len(values):
                out[name], out[f"{name}_ci"] = values.mean(), interval(values)
        return out


def interval(values: Tensor, draws: int = 1000, of: Callable[[NDArray[Any]], NDArray[Any]] = np.ravel) -> Tensor:
    """Half the width of the 95 % bootstrap confidence interval of the mean of ``values`` [n], whatever their order.

    Of ``values`` [n, k], that of a function ``of`` their k means: [draws, k] -> [draws].
    """
    rows = values.double().cpu().numpy().reshape(len(values), -1)
    picks = np.random.default_rng(0).integers(len(rows), size=(draws, len(rows)))
    means = rows[np.lexsort(rows.T)][picks].mean(1)
    low, high = np.percentile(of(means), [2.5, 97.5])
    return torch.tensor((high - low) / 2)

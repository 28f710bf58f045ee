"""Instruction following, object consistency, SC and PQ on the toybox, read by its oracle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from ..toybox.oracle import Reading, Score, judge, read, read_all
from ..toybox.render import draw
from ..toybox.truth import Truth
from ..toybox.world import Placed, Scene

SCORES = ("following", "strict", "consistency", "success")


class ToyboxFollowing(Metric):
    """Scores generated toybox pictures.

    ``compute`` gives ``following`` (share of an instruction's conditions that hold, averaged over instructions), ``strict`` (share of
    instructions with all of them), ``consistency`` (of every toy that a reference shows), ``success`` (share of edits whose change came
    about; a copy of the source has none), each with the half-width of its 95 % confidence interval (bootstrap over pictures) under
    ``<name>_ci``.
    """

    full_state_update = False
    following: list[Tensor]
    strict: list[Tensor]
    consistency: list[Tensor]
    success: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in SCORES:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def score(self, pictures: Tensor, truths: Sequence[Truth]) -> list[dict[str, float]]:
        """Of pictures [b, 3, 64, 64] in [-1, 1], and what each was asked to show: the scores that each has, by name."""
        arrays = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [_row(judge(reading, truth)) for reading, truth in zip(read_all(arrays), truths, strict=True)]

    def update(self, pictures: Tensor, truths: Sequence[Truth]) -> None:
        """Add pictures; arguments as of :meth:`score`."""
        self.include(self.score(pictures, truths))

    def include(self, rows: Sequence[dict[str, float]]) -> None:
        """The scores of some pictures."""
        for name in SCORES:
            getattr(self, name).append(torch.tensor([row[name] for row in rows if name in row]))

    def compute(self) -> dict[str, Tensor]:
        """The scores and their intervals; a score without a picture is left out."""
        out = {}
        for name in SCORES:
            values = dim_zero_cat(getattr(self, name))
            if len(values):
                out[name], out[f"{name}_ci"] = values.mean(), interval(values)
        return out


def _row(found: Score) -> dict[str, float]:
    row = {"following": found.following, "strict": float(found.strict)}
    if found.consistency:
        row["consistency"] = float(np.mean(found.consistency))
    return row if found.success is None else row | {"success": float(found.success)}


SHOWN = 0.8  # consistency of a toy that is the one shown: another toy of the same words has 0.67 on average
CLEAN, RECOGNISABLE = 0.06, 0.25  # at most this share of the toys' contrast is unexplained


def toybox_rating(picture: NDArray[np.uint8], truth: Truth) -> tuple[float, float]:
    """The oracle's SC and PQ of a picture [64, 64, 3], each 0, 0.5 or 1, by ImagenHub's guideline.

    SC is the degree of the least satisfied condition. Each toy is one condition, partly satisfied (0.5) if at least half of its parts are:
    every attribute that is asked for, and its likeness where a reference shows it. Background, style, place and count hold or do not.
    PQ is 1 if the picture is one that the renderer could have made, 0.5 if its toys are recognisable, else 0 (see :func:`unexplained`).
    """
    seen = read(picture)
    scored = judge(seen, truth)
    parts: defaultdict[str, list[bool]] = defaultdict(list)
    for name, holds in scored.conditions.items():  # "colour 1" is a part of toy 1
        parts[name.split()[-1]].append(holds)
    for (k, _), consistency in zip(truth.shown, scored.consistency, strict=True):
        parts[str(k + 1)].append(consistency >= SHOWN)
    least = min(sum(p) / len(p) for p in parts.values())
    error = unexplained(picture, seen)
    return 1.0 if least == 1 else 0.5 * (least >= 0.5), 1.0 if error <= CLEAN else 0.5 * (error <= RECOGNISABLE)


def unexplained(picture: NDArray[np.uint8], seen: Reading) -> float:
    """How badly a rendering of what the oracle read in it explains a picture [64, 64, 3]: squared error over the toys' squared contrast.

    Near 0 for a clean rendering, 1 for one that explains no more than an empty ground would; infinite where no toy is read.
    """
    toys = tuple(Placed(s.toy, s.size, s.x, s.y) for s in seen.toys)
    rendered, ground = (draw(Scene(t, seen.background, seen.style, ""))[0].astype(np.float64) for t in (toys, ()))
    return float(((picture - rendered) ** 2).sum() / ((rendered - ground) ** 2).sum()) if toys else float("inf")


def interval(values: Tensor, draws: int = 1000, of: Callable[[NDArray[Any]], NDArray[Any]] = np.ravel) -> Tensor:
    """Half the width of the 95 % bootstrap confidence interval of the mean of ``values`` [n], whatever their order.

    Of ``values`` [n, k], that of a function ``of`` their k means: [draws, k] -> [draws].
    """
    rows = values.double().cpu().numpy().reshape(len(values), -1)
    picks = np.random.default_rng(0).integers(len(rows), size=(draws, len(rows)))
    means = rows[np.lexsort(rows.T)][picks].mean(1)
    low, high = np.percentile(of(means), [2.5, 97.5])
    return torch.tensor((high - low) / 2)

"""SC, PQ and O of the toybox's held-out pictures, task by task, before and after."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from lightning_mmgen.metrics.following import toybox_rating
from lightning_mmgen.metrics.ratings import Ratings
from lightning_mmgen.pipeline import to_pil
from lightning_mmgen.prompt import Record

from .held_out import HeldOutCallback, held_out_parts
from .rows import log_scores, write_rows

SCORES = {"sc": "SC", "pq": "PQ", "o_instruct_imagen": "O", "o_imagenhub": "O, ImagenHub", "accuracy": "accuracy"}
Scores = dict[str, float]


class RatingsEvaluation(HeldOutCallback):
    """Lets the oracle rate the pictures of held-out toybox records as ImagenHub's raters would: SC, PQ, accuracy, and O in both forms of
    :class:`~lightning_mmgen.metrics.Ratings`, of each task and as their means over tasks (Instruct-Imagen, Table 2); prints a table of
    them at the end.

    Args:
        every: optimizer steps between evaluations; 0 for before and after only.
        count: held-out records; 0 for all.
    """

    at_start = True

    def __init__(self, every: int = 0, count: int = 64) -> None:
        super().__init__(every, count)
        self.before: dict[str, Scores] = {}
        self.after: dict[str, Scores] = {}

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rated: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for first, part in held_out_parts(trainer, pl_module, self.count):
            ratings = [rate(picture, record) for record, picture in zip(*part, strict=True)]
            write_rows(trainer, "ratings", part, [dict(zip(("sc", "pq"), rating, strict=True)) for rating in ratings], first)
            for record, rating in zip(part.records, ratings, strict=True):
                rated[record.task].append(rating)
        if not rated:
            raise ValueError("RatingsEvaluation: there are no held-out records; data.held_out names them")
        found = {task: summary(rated[task]) for task in sorted(rated)}
        log_scores(trainer, {f"ratings/{name}/{task}": scores[name] for task, scores in found.items() for name in SCORES})
        log_scores(trainer, {f"held_out/{name}": mean(found, name) for name in SCORES})
        self.before, self.after = self.before or found, found

    def table(self) -> str:
        """A row a task, with 95 % confidence intervals, and the means over tasks."""
        if not self.after:
            return ""
        columns = [(title, self.after, name) for name, title in SCORES.items()]
        columns += [("O before", self.before, "o_instruct_imagen")] if self.before is not self.after else []
        lines = [f"{'held-out tasks':<18}{'pictures':>10}" + "".join(f"{title:>15}" for title, _, _ in columns)]
        for task, scores in self.after.items():
            cells = [cell(found.get(task, {}), name) for _, found, name in columns]
            lines.append(f"{task:<18}{scores['pictures']:>10.0f}" + "".join(f"{c:>15}" for c in cells))
        return "\n".join([*lines, f"{'mean of tasks':<28}" + "".join(f"{mean(found, name):>15.2f}" for _, found, name in columns)])

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]


def rate(picture: Tensor, record: Record) -> tuple[float, float]:
    """SC and PQ of a picture [3, 64, 64] in [-1, 1]; one that is not finite has neither.

    Raises:
        ValueError: the record is not of the toybox.
    """
    if "truth" not in record.extra:
        raise ValueError("RatingsEvaluation reads toybox pictures only: data.held_out must be drawn by a ToyboxSource")
    return toybox_rating(np.asarray(to_pil(picture[None])[0]), record.extra["truth"]) if picture.isfinite().all() else (0.0, 0.0)


def summary(rated: list[tuple[float, float]]) -> Scores:
    """The scores of a task and their intervals, and of how many pictures."""
    metric = Ratings()
    metric.update(*torch.tensor(rated).T)
    return {name: float(value) for name, value in metric.compute().items()} | {"pictures": float(len(rated))}


def mean(found: dict[str, Scores], name: str) -> float:
    """Of a score, over tasks."""
    return float(np.mean([scores[name] for scores in found.values()]))


def cell(scores: Scores, name: str) -> str:
    return f"{scores[name]:.2f} ± {scores[name + '_ci']:.2f}" if name in scores else "-"

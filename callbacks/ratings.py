"""SC, PQ and O of the toybox's held-out pictures, task by task, before and after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor

from lightning_mmgen.metrics.following import toybox_rating
from lightning_mmgen.metrics.ratings import Ratings
from lightning_mmgen.pipeline import to_pil
from lightning_mmgen.prompt import Record

from .loggers import log_scores
from .scoring import PictureEvaluation

SCORES = {"sc": "SC", "pq": "PQ", "o_instruct_imagen": "O", "o_imagenhub": "O, ImagenHub", "accuracy": "accuracy"}
Scores = dict[str, float]


class RatingsEvaluation(PictureEvaluation):
    """Lets the oracle rate the pictures of held-out toybox records as ImagenHub's raters would: SC, PQ, accuracy, and O in both forms of
    :class:`~lightning_mmgen.metrics.Ratings`, of each task and as their means over tasks (Instruct-Imagen, Table 2); arguments as of
    :class:`PictureEvaluation`."""

    name = "ratings"

    def score(self, trainer: Trainer, records: Sequence[Record], pictures: Tensor) -> dict[str, Tensor]:
        if any("truth" not in r.extra for r in records):
            raise ValueError("RatingsEvaluation reads toybox pictures only: data.held_out must be drawn by a ToyboxSource")
        ratings = [toybox_rating(np.asarray(image), r.extra["truth"]) for image, r in zip(to_pil(pictures), records, strict=True)]
        return dict(zip(("sc", "pq"), torch.tensor(ratings).reshape(-1, 2).T, strict=True))

    def sum_up(self, trainer: Trainer, rows: Sequence[tuple[Record, Scores]], **counts: float) -> None:
        rated: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for record, row in rows:
            if row:
                rated[record.task].append((row["sc"], row["pq"]))
        found = {task: summary(rated[task]) for task in sorted(rated)}
        log_scores(trainer, {f"ratings/{name}/{task}": scores[name] for task, scores in found.items() for name in SCORES})
        means = {name: mean(found, name) for name in SCORES if found}
        log_scores(trainer, {f"held_out/{name}": value for name, value in (means | counts).items()})
        self.keep(found)

    def table(self) -> str:
        """A row a task, with 95 % confidence intervals, and the means over tasks."""
        last = self.after or self.before
        if not last:
            return ""
        columns = [(title, last, name) for name, title in SCORES.items()]
        columns += [("O before", self.before, "o_instruct_imagen")] if self.after else []
        lines = [f"{'held-out tasks':<18}{'pictures':>10}" + "".join(f"{title:>15}" for title, _, _ in columns)]
        for task, scores in last.items():
            cells = [cell(found.get(task, {}), name) for _, found, name in columns]
            lines.append(f"{task:<18}{scores['pictures']:>10.0f}" + "".join(f"{c:>15}" for c in cells))
        return "\n".join([*lines, f"{'mean of tasks':<28}" + "".join(f"{mean(found, name):>15.2f}" for _, found, name in columns)])


def summary(rated: list[tuple[float, float]]) -> Scores:
    """The scores of a task and their intervals, and of how many pictures."""
    metric = Ratings()
    metric.update(*torch.tensor(rated).T)
    return {name: float(value) for name, value in metric.compute().items()} | {"pictures": float(len(rated))}


def mean(found: dict[str, Scores], name: str) -> float:
    """Of a score, over tasks."""
    return float(np.mean([scores[name] for scores in found.values()]))


def cell(scores: Scores, name: str) -> str:
    """A score of a task and half of its interval."""
    return f"{scores[name]:.2f} ± {scores[name + '_ci']:.2f}" if name in scores else "-"

"""What evaluations share: scores of the held-out pictures by name, on every logger, in rows, and in a table of before and after."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from lightning_mmgen.metrics.following import interval
from lightning_mmgen.prompt import Record

from .held_out import HeldOut, HeldOutCallback, gathered, held_out_parts, share
from .loggers import log_scores
from .rows import write_rows

COUNTS = ("held_out/scored", "held_out/bad_pictures")
"""What is logged beside the scores, and is none."""
Found = dict[str, list[float]]
"""By the name of a score, what each picture (or question) that has it scored; or one value, where a score is of all of them together."""


class Evaluation(HeldOutCallback):
    """A callback that scores what a model does with held-out records: before training, every ``every`` steps, at the end, and in a test.

    Args:
        every: optimizer steps between evaluations; 0 for before and after only.
        count: held-out instructions; 0 for all.
    """

    at_start = True
    heading: ClassVar[str] = "held-out instructions: {}"
    """Of the table, with the number of what was scored."""
    titles: ClassVar[dict[str, str]] = {}
    """What the table calls the scores, in its order; a score without a title is not in it."""

    def __init__(self, every: int = 0, count: int = 64) -> None:
        super().__init__(every, count)
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}

    def tell(self, trainer: Trainer, found: Found, **counts: float) -> None:
        """Log the means as ``held_out/<name>``, and keep the scores for the table; counts are logged alone."""
        means = {name: float(torch.tensor(values, dtype=torch.float64).mean()) for name, values in found.items()}
        log_scores(trainer, {f"held_out/{name}": value for name, value in (means | counts).items()})
        self.keep(found)

    def keep(self, found: dict[str, Any]) -> None:
        """What the table shows: the first look, and the last."""
        self.before, self.after = (self.before, found) if self.before else (found, {})

    def table(self) -> str:
        """Before and after, with 95 % confidence intervals (bootstrap)."""
        looks = {"before": self.before, "after": self.after} if self.after else {"": self.before}
        last = [*looks.values()][-1]
        rows = [name for name in self.titles if name in last]
        if not rows:
            return ""
        lines = [f"{self.heading.format(max(len(values) for values in last.values())):<28}" + "".join(f"{t:>16}" for t in looks)]
        lines += [f"{self.titles[name]:<28}" + "".join(f"{_cell(look.get(name, [])):>16}" for look in looks.values()) for name in rows]
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]


def _cell(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    scores = torch.tensor(values)
    return f"{float(scores.mean()):.3f} ± {float(interval(scores)):.3f}"


class PictureEvaluation(Evaluation):
    """Scores the held-out pictures, part by part: each rank its share, and all of them have all scores. A row a picture goes to the run
    folder. Pictures that are not finite have no score, and are counted (``bad_pictures``).

    Args:
        every: optimizer steps between evaluations; 0 for before and after only.
        count: held-out instructions; 0 for all.
        budget: seconds of one evaluation; it ends with the batch in which they have passed, on all ranks.
        batch_size: of one device.
    """

    name: ClassVar[str]
    """Of the file of rows."""
    nothing: ClassVar[str] = "there are no held-out records; data.held_out names them"
    """What is wrong where no record is scored."""

    def __init__(self, every: int = 0, count: int = 64, budget: float | None = None, batch_size: int = 32) -> None:
        super().__init__(every, count)
        self.budget, self.batch_size = budget, batch_size

    def concerns(self, record: Record) -> bool:
        """Whether the record is one to score."""
        return True

    @abstractmethod
    def score(self, trainer: Trainer, records: Sequence[Record], pictures: Tensor) -> Mapping[str, Tensor]:
        """The scores of pictures [n, 3, H, W], on the model's device, by name, [n] each; nan where a picture does not have one."""

    def look_again(
        self, trainer: Trainer, pl_module: LightningModule, first: int, part: HeldOut, good: Sequence[int]
    ) -> Mapping[str, Tensor]:
        """More scores of the pictures ``good`` of a part, [len(good)] each; every rank computes all of them."""
        return {}

    def together(self, trainer: Trainer) -> dict[str, float]:
        """Scores of all the pictures of a look together."""
        return {}

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows: list[tuple[Record, dict[str, float]]] = []
        drawn = bad = 0
        for first, part in held_out_parts(trainer, pl_module, self.count, self.batch_size, self.budget):
            finite = part.pictures.isfinite().flatten(1).all(1).tolist()
            scores: list[dict[str, float] | None] = [{} if self.concerns(record) else None for record in part.records]
            if good := [i for i, row in enumerate(scores) if row is not None and finite[i]]:
                columns = {**self._shared(trainer, pl_module, part, good), **self.look_again(trainer, pl_module, first, part, good)}
                for i, values in zip(good, zip(*(column.tolist() for column in columns.values()), strict=True), strict=True):
                    scores[i] = {name: value for name, value in zip(columns, values, strict=True) if value == value}
            write_rows(trainer, self.name, part, scores, first)
            rows += [(record, row) for record, row in zip(part.records, scores, strict=True) if row is not None]
            drawn, bad = drawn + len(finite), bad + finite.count(False)
        if not rows:
            raise ValueError(f"{type(self).__name__}: {self.nothing}")
        self.sum_up(trainer, rows, scored=drawn - bad, bad_pictures=bad)

    def sum_up(self, trainer: Trainer, rows: Sequence[tuple[Record, dict[str, float]]], **counts: float) -> None:
        """Log and keep what a look found, of the same rows on all ranks."""
        names = dict.fromkeys(name for _, row in rows for name in row)
        found = {name: [row[name] for _, row in rows if name in row] for name in names}
        self.tell(trainer, found | {name: [value] for name, value in self.together(trainer).items()}, **counts)

    def _shared(self, trainer: Trainer, pl_module: LightningModule, part: HeldOut, good: Sequence[int]) -> dict[str, Tensor]:
        """The scores of the pictures ``good``, each computed on one rank."""
        own = [good[i] for i in share(trainer, len(good))]
        columns = self.score(trainer, [part.records[i] for i in own], part.pictures[own].to(pl_module.device))
        stacked = torch.stack([column.double().cpu() for column in columns.values()], 1)
        return dict(zip(columns, gathered(trainer, stacked, len(good)).T, strict=True))

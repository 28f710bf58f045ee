"""``mmgen report``: runs side by side on one self-contained page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..data.images import open_picture
from ..metrics.following import interval
from ..metrics.ratings import Ratings
from ..prompt import RecordError
from .charts import bars, colour, lines
from .runs import Case, Rated, Run, read_run

TEMPLATES = Path(__file__).parent / "templates"
SIDE = 160  # of a picture on the page, in pixels
LOWER = ("mse", "lpips", "distance", "l1", "l2", "copy_paste")
"""Scores whose name ends so are better when they are lower."""


class Mean(NamedTuple):
    """A mean over ``n`` pictures, with the half-width of its 95 % bootstrap interval (nan of one picture)."""

    mean: float
    half: float
    n: int


def mean(values: Sequence[float]) -> Mean | None:
    """The mean of some scores; None of none."""
    if not values:
        return None
    half = float(interval(torch.tensor(values))) if len(values) > 1 else math.nan
    return Mean(sum(values) / len(values), half, len(values))


def report(folders: Sequence[str], out: str, pictures: int = 16, score: str | None = None) -> str:
    """Write the page.

    Args:
        folders: of runs; of several versions the newest.
        out: the HTML file.
        pictures: instructions in the grid.
        score: what the best and worst cases go by; by default the first one that the runs have.

    Returns:
        A line that says what the page shows.

    Raises:
        FileNotFoundError: no such run folder.
        ValueError: no run has the score.
    """
    runs = [read_run(Path(folder)) for folder in folders]
    for k, run in enumerate(runs):  # two runs of one name stay apart
        if [r.name for r in runs].count(run.name) > 1:
            run.name = f"{run.name} ({k + 1})"
    names = scores_of(runs)
    if score is not None and score not in names:
        raise ValueError(f"--score {score}: no run has it; there are {', '.join(names) or 'none'}")
    page = Page(runs, pictures, score or next(iter(names), None))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((TEMPLATES / "report.html").read_text())
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(template.render(page=page, colour=colour, lines=lines))
    noted = sum(len(run.notes) for run in runs)
    return f"{out}: {len(runs)} runs, {len(names)} scores, {len(page.shared)} instructions in all of them, {noted} notes"


def scores_of(runs: Sequence[Run]) -> list[str]:
    """The names of all scores, in the order in which evaluations have them."""
    return list(dict.fromkeys(name for run in runs for case in run.cases.values() for name in case.scores))


@dataclass
class Page:
    """What the template asks for."""

    runs: list[Run]
    count: int
    score: str | None

    @property
    def scores(self) -> list[str]:
        """All scores."""
        return scores_of(self.runs)

    @property
    def first(self) -> Run:
        """The run that others are compared with: the first one with evaluated pictures."""
        return next((run for run in self.runs if run.cases), self.runs[0])

    @property
    def others(self) -> list[Run]:
        """The runs that are compared with the first."""
        return [run for run in self.runs if run.cases and run is not self.first]

    @property
    def shared(self) -> list[str]:
        """The instructions that every run with evaluated pictures was asked for."""
        common = [self.pairs(run) for run in self.runs if run.cases]
        return [i for i in self.first.cases if all(i in ids for ids in common)]

    def pairs(self, run: Run) -> list[str]:
        """The instructions of a run that are those of the first, by id and text."""
        return [i for i, c in self.first.cases.items() if i in run.cases and run.cases[i].instruction == c.instruction]

    def values(self, run: Run, score: str, task: str | None = None) -> list[float]:
        """A score of a run's pictures, of one task or all."""
        return [c.scores[score] for c in run.cases.values() if score in c.scores and task in (None, c.task)]

    def table(self) -> Iterator[tuple[str, list[Mean | None], list[Mean | None]]]:
        """A row a score: its name, its mean by run, and the difference of every other run to the first, over the instructions of both."""
        for score in self.scores:
            yield score, [mean(self.values(run, score)) for run in self.runs], [self.difference(run, score) for run in self.others]

    def difference(self, run: Run, score: str) -> Mean | None:
        """The mean of the paired differences to the first run."""
        pairs = [(self.first.cases[i].scores, run.cases[i].scores) for i in self.pairs(run)]
        return mean([b[score] - a[score] for a, b in pairs if score in a and score in b])

    @property
    def tasks(self) -> list[str]:
        """All tasks."""
        return list(dict.fromkeys(case.task for run in self.runs for case in run.cases.values()))

    def by_task(self, score: str) -> list[tuple[Run, list[Mean | None], float]]:
        """A row a run: its mean by task, and the mean over tasks (Instruct-Imagen, Table 3)."""
        rows = []
        for run in self.runs:
            cells = [mean(self.values(run, score, task)) for task in self.tasks]
            known = [c.mean for c in cells if c is not None]
            rows.append((run, cells, sum(known) / len(known) if known else math.nan))
        return rows

    def task_bars(self, score: str) -> Markup:
        """The same as bars (Instruct-Imagen, Figure 4)."""
        cells = [[mean(self.values(run, score, task)) for run in self.runs] for task in self.tasks]
        return bars(self.tasks, [[c and (c.mean, c.half) for c in group] for group in cells])

    def rated(self, run: Run, task: str | None = None) -> dict[str, float] | None:
        """SC, PQ and O of the people who rated a run, of one task or all."""
        if run.rated is None:
            return None
        uids = [u for u in run.rated.sc if task is None or (u in run.cases and run.cases[u].task == task)]
        return rate(run.rated, uids) if uids else None

    def cases(self) -> Iterator[tuple[Case, list[Case | None]]]:
        """Instructions of the grid with what each run drew: those of all runs if there are any, else each run's own."""
        ids = self.shared or list(dict.fromkeys(i for run in self.runs for i in run.cases))
        for i in ids[: self.count]:
            cases = [run.cases.get(i) for run in self.runs]
            yield next(c for c in cases if c is not None), cases

    def extremes(self, run: Run, best: bool, count: int = 4) -> list[Case]:
        """The cases of a run with the best or worst score."""
        cases = [c for c in run.cases.values() if self.score in c.scores]
        lower = str(self.score).endswith(LOWER)
        return sorted(cases, key=lambda c: c.scores[str(self.score)], reverse=best != lower)[:count]

    def charts(self) -> Iterator[tuple[str, Markup]]:
        """Every curve that a run has, all runs in one chart."""
        names = sorted({name for run in self.runs for name in run.curves} - {"epoch"}, key=_order)
        for name in names:
            if drawn := lines([run.curves.get(name, []) for run in self.runs]):
                yield name, drawn

    def parameters(self) -> Iterator[tuple[str, list[tuple[str, ...] | None]]]:
        """A row a module, a cell a run."""
        for module in dict.fromkeys(m for run in self.runs for m in run.parameters):
            yield module, [run.parameters.get(module) for run in self.runs]

    def differences(self) -> Iterator[tuple[str, list[str]]]:
        """The settings in which the runs differ."""
        runs = [run for run in self.runs if run.config]
        for key in dict.fromkeys(k for run in runs for k in run.config):
            if len({run.config.get(key) for run in runs}) > 1:
                yield key, [run.config.get(key, "-") for run in self.runs]

    def cost(self) -> list[tuple[str, list[str]]]:
        """What a run took."""
        rows = {"steps": [_last(run, "loss", "{:.0f}", step=True) for run in self.runs]}
        rows["hours"] = [_last(run, "throughput/hours", "{:.3g}") for run in self.runs]
        for name, label in (("samples_per_second", "samples a second (median)"), ("waiting", "share of time waiting (median)")):
            found = [[v for _, v in run.curves.get(f"throughput/{name}", [])] for run in self.runs]
            rows[label] = [f"{median(values):.3g}" if values else "-" for values in found]
        rows["peak memory, GB"] = [_last(run, "throughput/peak_memory_gb", "{:.3g}") for run in self.runs]
        return list(rows.items())

    def facts(self) -> list[tuple[str, list[str]]]:
        """What reproduces the runs."""
        rows = [(key, [str(run.facts.get(key) or "-")[:16] for run in self.runs]) for key in ("seed", "revision", "data", "python")]
        packages = [p if isinstance(p := run.facts.get("packages"), dict) else {} for run in self.runs]
        names = dict.fromkeys(name for p in packages for name in p)
        return rows + [(name, [str(p.get(name, "-")) for p in packages]) for name in names]

    def picture(self, run: Run, path: str | None) -> Markup:
        """A picture of a run folder, inside the page."""
        if path is None:
            return Markup('<span class="none">no picture</span>')
        try:
            image = open_picture(path, run.folder)
        except RecordError as error:
            return Markup('<span class="none" title="{}">unreadable</span>').format(error)
        image.thumbnail((2 * SIDE, 2 * SIDE))
        kind = "PNG" if max(image.size) < SIDE else "JPEG"
        image.save(data := io.BytesIO(), kind)
        source = f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
        return Markup('<img src="{}" alt="{}">').format(source, path)


def rate(rated: Rated, uids: Sequence[str]) -> dict[str, float]:
    """The metric of some of the rated pictures, and how many there are."""
    metric = Ratings()
    metric.update(*(torch.tensor([values[u] for u in uids]) for values in (rated.sc, rated.pq)))
    return {name: float(value) for name, value in metric.compute().items()} | {"n": float(len(uids))}


def _order(name: str) -> tuple[int, str]:
    groups = ("held_out", "loss", "timestep_loss", "gradient_norm", "lr-", "throughput")
    return next((i for i, g in enumerate(groups) if name.startswith(g)), len(groups)), name


def _last(run: Run, name: str, form: str, step: bool = False) -> str:
    curve: list[Any] = run.curves.get(name, [])
    return form.format(curve[-1][0 if step else 1]) if curve else "-"

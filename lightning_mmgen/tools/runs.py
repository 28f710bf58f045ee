"""What a run folder holds, read with patience: what is missing or cannot be read is noted, never an error."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..metrics.ratings import rating_table

Curve = list[tuple[int, float]]
T = TypeVar("T")


@dataclass
class Case:
    """One held-out instruction of a run, as its last evaluation saw it; paths are relative to the run folder."""

    id: str
    task: str
    instruction: str
    picture: str | None
    references: list[str | None]
    target: str | None
    scores: dict[str, float]


class Rated(NamedTuple):
    """Ratings of the pictures that every rater has rated, each by rater."""

    raters: list[str]
    sc: dict[str, list[float]]
    pq: dict[str, list[float]]


@dataclass
class Run:
    """A run folder; ``notes`` tell what is missing."""

    name: str
    folder: Path
    notes: list[str] = field(default_factory=list)
    cases: dict[str, Case] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    rated: Rated | None = None

    def attempt(self, what: str, read: Callable[[], T], otherwise: T) -> T:
        """What ``read`` gives; where it fails, a note and ``otherwise``."""
        try:
            return read()
        except FileNotFoundError:
            self.notes.append(f"{what}: not there")
        except Exception as error:  # a file of another version may fail in any way, and the other runs are still worth a page
            self.notes.append(f"{what}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:160]})")
        return otherwise


def find_run(path: Path) -> Path:
    """The run folder: the path itself, or the newest ``version_k`` in it.

    Raises:
        FileNotFoundError: no such folder.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such run folder")
    versions = [p for p in path.glob("version_*") if p.name.removeprefix("version_").isdigit()]
    return max(versions, key=lambda p: int(p.name.removeprefix("version_")), default=path)


def name_run(folder: Path) -> str:
    """What a page calls a run: its folder, and the folder above it where it is a version of one."""
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("version_") else folder.name


def read_run(path: Path, curves: bool = True) -> Run:
    """Everything that a page shows of a run.

    Raises:
        FileNotFoundError: no such folder.
    """
    folder = find_run(path)
    run = Run(name_run(folder), folder)
    _read_cases(run)
    run.rated = run.attempt("ratings", lambda: read_rated(folder), None)
    if curves:
        run.curves = run.attempt("curves", lambda: _curves(folder), {})
        run.config = run.attempt("config.yaml", lambda: _config(folder / "config.yaml"), {})
        run.parameters = run.attempt("parameters.txt", lambda: _parameters(folder / "parameters.txt"), {})
        run.facts = run.attempt("run.json", lambda: _object(json.loads((folder / "run.json").read_text())), {})
    return run


# -- evaluations and ratings -------------------------------------------------------------------------------------------------------


def _read_cases(run: Run) -> None:
    files = sorted((run.folder / "evaluation").glob("*.jsonl"))
    if not files:
        run.notes.append("evaluation: no rows; evaluation callbacks write them")
    bad: Counter[str] = Counter()
    for file in files:
        rows: dict[int, dict[str, Case]] = defaultdict(dict)
        for line in run.attempt(file.name, file.read_text, "").splitlines():
            try:
                step, case = _case(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError):
                bad[file.name] += 1
            else:
                rows[step][case.id] = case
        if rows:
            run.steps[file.stem] = last = max(rows)
            for case in rows[last].values():
                run.cases.setdefault(case.id, case).scores.update(case.scores)
    run.notes += [f"{name}: {count} rows cannot be read" for name, count in bad.items()]
    if len(set(run.steps.values())) > 1:
        run.notes.append("evaluations of different steps: " + ", ".join(f"{n} {s}" for n, s in run.steps.items()))


def _case(row: Any) -> tuple[int, Case]:
    scores = {str(k): float(v) for k, v in row.get("scores", {}).items() if v is not None and math.isfinite(v)}
    given = [row.get("picture"), row.get("target"), *(references := list(row.get("references") or []))]
    if not all(path is None or isinstance(path, str) for path in given):
        raise TypeError("a picture is a path")
    words = (str(row["id"]), str(row.get("task", "")), str(row.get("instruction", "")))
    return int(row["step"]), Case(*words, given[0], references, given[1], scores)


def read_rated(folder: Path) -> Rated | None:
    """The raters' files of a run, ``ratings/<rater>.tsv``; None where nobody has rated.

    Raises:
        ValueError: a file is no file of ratings, or no picture is rated by all.
    """
    files = sorted((folder / "ratings").glob("*.tsv"))
    tables = [_of_one_model(file) for file in files]
    tables, raters = [t for t in tables if t], [f.stem for f, t in zip(files, tables, strict=True) if t]
    if not tables:
        return None
    shared = [uid for uid in tables[0] if all(uid in table for table in tables)]
    if not shared:
        raise ValueError(f"no picture is rated by all of {', '.join(raters)}")
    sc, pq = ({uid: [table[uid][k] for table in tables] for uid in shared} for k in (0, 1))
    return Rated(raters, sc, pq)


def _of_one_model(file: Path) -> dict[str, list[float]]:
    table = rating_table(file)
    if len(models := {model for _, model in table}) > 1:
        raise ValueError(f"{file.name} rates {len(models)} models, not this run alone")
    return {uid: rating for (uid, _), rating in table.items()}


# -- curves, configuration, parameters -----------------------------------------------------------------------------------------------


def _curves(folder: Path) -> dict[str, Curve]:
    """Scalars by name, from TensorBoard's event files or Lightning's ``metrics.csv``."""
    if (table := folder / "metrics.csv").is_file():
        out: defaultdict[str, Curve] = defaultdict(list)
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name != "step" and value:
                        out[name].append((int(row["step"]), float(value)))
        return dict(out)
    if not any(folder.glob("events.out.tfevents.*")):
        raise FileNotFoundError(folder)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"scalars": 1000, "images": 1, "tensors": 1})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _config(file: Path) -> dict[str, str]:
    """The configuration, flat: dotted name -> value."""
    import yaml

    return flat(_object(yaml.safe_load(file.read_text())))


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"an object is expected, not {type(value).__name__}")
    return value


def flat(config: dict[str, Any]) -> dict[str, str]:
    """A configuration by dotted names."""
    return dict(_flat(config))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, str(value)
    for key, inner in items or ():
        yield from _flat(inner, f"{name}.{key}" if name else str(key))


def _parameters(file: Path) -> dict[str, tuple[str, ...]]:
    """The parameter table: module -> how it trains, its rate, trainable and all parameters."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in file.read_text().splitlines() if not line.startswith("--")]
    if not lines or lines[0][0] != "module" or any(len(line) < 5 for line in lines):
        raise ValueError("not a parameter table")
    return {module: tuple(cells) for module, *cells in lines[1:]}

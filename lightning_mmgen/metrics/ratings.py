"""SC, PQ and O: raters' scores of pictures, as ImagenHub and Instruct-Imagen publish them, and how far the raters agree."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from .following import interval

SCALE = (0.0, 0.5, 1.0)


class Ratings(Metric):
    """Semantic consistency (SC) and perceptual quality (PQ) of pictures, each 0, 0.5 or 1, by the same raters for every picture.

    ``compute`` gives means over raters and pictures:

    - ``sc``, ``pq``, and ``accuracy``: the share of ratings with SC = 1 (Instruct-Imagen, table 2),
    - ``o_imagenhub``: the mean of sqrt(SC x PQ) of every single rating, as ImagenHub's code has it (arXiv 2310.01596),
    - ``o_instruct_imagen``: sqrt(mean SC x mean PQ), which the tables of Instruct-Imagen (arXiv 2401.01952) equal,

    each with the half-width of its 95 % confidence interval (bootstrap over pictures) under ``<name>_ci``. Several raters add, for all but
    the last, ``<name>_std`` (population standard deviation of the raters' own means), ``<name>_kappa`` (Fleiss) and ``<name>_alpha``
    (Krippendorff, ordinal).
    """

    full_state_update = False
    sc: list[Tensor]
    pq: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sc", default=[], dist_reduce_fx="cat")
        self.add_state("pq", default=[], dist_reduce_fx="cat")

    def update(self, sc: Tensor, pq: Tensor) -> None:
        """Ratings [pictures, raters], or [pictures] of a single rater.

        Raises:
            ValueError: SC and PQ differ in shape, the number of raters changes, or a rating is not on the scale.
        """
        sc, pq = (v.float().reshape(len(v), -1) if v.ndim < 3 else v for v in (sc, pq))
        if sc.ndim != 2 or sc.shape != pq.shape or (self.sc and self.sc[0].shape[1] != sc.shape[1]):
            raise ValueError(f"ratings must be [pictures, raters], the same raters always: SC {list(sc.shape)}, PQ {list(pq.shape)}")
        if not torch.isin(torch.cat([sc, pq]), torch.tensor(SCALE, device=sc.device)).all():
            raise ValueError("a rating must be 0, 0.5 or 1")
        self.sc.append(sc)
        self.pq.append(pq)

    def compute(self) -> dict[str, Tensor]:
        """The means, their intervals, and the raters' agreement."""
        sc, pq = dim_zero_cat(self.sc).double(), dim_zero_cat(self.pq).double()
        out = {}
        for name, values in {"sc": sc, "pq": pq, "accuracy": (sc == 1).double(), "o_imagenhub": (sc * pq).sqrt()}.items():
            out[name], out[f"{name}_ci"] = values.mean(), interval(values.mean(1))
            if values.shape[1] > 1:
                out[f"{name}_std"] = values.mean(0).std(correction=0)
                out[f"{name}_kappa"], out[f"{name}_alpha"] = fleiss_kappa(values), krippendorff_alpha(values)
        both = torch.stack([sc.mean(1), pq.mean(1)], 1)
        out["o_instruct_imagen"] = both.mean(0).prod().sqrt()
        out["o_instruct_imagen_ci"] = interval(both, of=lambda means: means.prod(-1) ** 0.5)
        return {name: value.float() for name, value in out.items()}


def _counts(values: Tensor) -> Tensor:
    """How many raters gave a picture each of the values that occur, in rising order: [n, raters] -> [n, levels]."""
    return torch.stack([(values == level).sum(1) for level in torch.unique(values)], 1).double()


def fleiss_kappa(values: Tensor) -> Tensor:
    """Fleiss' kappa (1971) of ratings [n, raters]: agreement beyond chance, each value a class; nan where there is only one value."""
    counts, raters = _counts(values), values.shape[1]
    observed = (counts * (counts - 1)).sum(1).mean() / (raters * (raters - 1))
    chance = counts.mean(0).div(raters).square().sum()
    return (observed - chance) / (1 - chance)


def krippendorff_alpha(values: Tensor) -> Tensor:
    """Krippendorff's alpha of ratings [n, raters] on an ordinal scale (2011, section E); nan where there is only one value."""
    counts = _counts(values)
    total = counts.sum(0)
    rank = total.cumsum(0) - total / 2  # in the middle of the equal ones
    distance = (rank[:, None] - rank).square()
    observed = (counts.T @ counts * distance).sum() / (values.shape[1] - 1)
    chance = (total[:, None] * total * distance).sum() / (total.sum() - 1)
    return 1 - observed / chance


def read_ratings(files: Sequence[str | Path]) -> dict[str, tuple[Tensor, Tensor]]:
    """ImagenHub's rating files of one task, one tsv a rater: a row a picture (``uid``), a column a model, ``[SC, PQ]`` in each cell.

    Returns:
        For each model SC and PQ, both [pictures, raters], in the first file's order of pictures.

    Raises:
        ValueError: the files do not rate the same pictures of the same models, or a cell is no rating.
    """
    tables = [rating_table(Path(file)) for file in files]
    if not tables:
        raise ValueError("no files of ratings")
    for file, table in zip(files, tables, strict=True):
        if odd := sorted(table.keys() ^ tables[0].keys()):
            raise ValueError(f"{file}: does not rate the same pictures and models as {files[0]}: {' of '.join(odd[0])}")
    out = {}
    for model in dict.fromkeys(model for _, model in tables[0]):
        rated = torch.tensor([[table[key] for table in tables] for key in tables[0] if key[1] == model])  # [pictures, raters, 2]
        out[model] = rated[..., 0], rated[..., 1]
    return out


def rating_table(file: Path) -> dict[tuple[str, str], list[float]]:
    """One rater's file: (picture, model) -> [SC, PQ].

    Raises:
        ValueError: no column ``uid``, a picture twice, or a cell that is no rating.
    """
    out: dict[tuple[str, str], list[float]] = {}
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines, delimiter="\t"), start=2):
            uid = row.pop("uid", None)
            if uid is None or (uid, next(iter(row), "")) in out:
                raise ValueError(f"{file}: line {number}: {'no column uid' if uid is None else f'{uid} again'}")
            for model, cell in row.items():
                out[uid, model] = _rating(cell, f"{file}: line {number}, column {model}")
    return out


def _rating(cell: str | None, where: str) -> list[float]:
    try:
        rating = json.loads(cell or "")
    except json.JSONDecodeError:
        rating = None
    if not isinstance(rating, list) or len(rating) != 2 or any(value not in SCALE for value in rating):
        raise ValueError(f"{where}: must be [SC, PQ], each 0, 0.5 or 1; it is {cell!r}")
    return [float(value) for value in rating]

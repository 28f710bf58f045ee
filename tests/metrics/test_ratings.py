"""SC, PQ and O against slow sums over a small table in the form of ImagenHub's rating files."""

from __future__ import annotations

from itertools import combinations
from math import sqrt
from pathlib import Path
from statistics import mean, pstdev

import numpy as np
import pytest
import torch
import torch.multiprocessing

from lightning_mmgen.metrics import Ratings, fleiss_kappa, krippendorff_alpha, read_ratings
from lightning_mmgen.metrics.following import interval

# picture -> [SC, PQ] of three raters
PAINTER = {
    "a.jpg": ["[1, 1]", "[1,0.5]", "[1,1]"],
    "b.jpg": ["[0.5,1]", "[1, 0.5]", "[0.5,0.5]"],
    "c.jpg": ["[0,0.5]", "[0, 1]", "[0.5,0]"],
    "d.jpg": ["[0.5,0.5]", "[0,0]", "[0,0.5]"],
    "e.jpg": ["[1,0]", "[1,0.5]", "[0.5, 1]"],
}
COPIER = {picture: ["[1,0]"] * 3 for picture in PAINTER}


def write(folder: Path, edits: dict[str, str] | None = None) -> list[Path]:
    """Three files, one a rater; ``edits`` are made in the last."""
    files = [folder / f"rater{r + 1}.tsv" for r in range(3)]
    for r, file in enumerate(files):
        rows = ["uid\tPainter\tCopier", *(f"{p}\t{PAINTER[p][r]}\t{COPIER[p][r]}" for p in PAINTER)]
        text = "\r\n".join(rows) + "\r\n"
        for old, new in (edits or {}).items() if r == 2 else ():
            assert old in text
            text = text.replace(old, new)
        file.write_bytes(text.encode())
    return files


def scored(sc: torch.Tensor, pq: torch.Tensor) -> dict[str, float]:
    metric = Ratings()
    metric.update(sc, pq)
    return {name: float(value) for name, value in metric.compute().items()}


def plain() -> list[list[tuple[float, float]]]:
    """(SC, PQ) of the painter, by rater and picture."""
    pairs = [[tuple(float(v) for v in cell.strip("[]").split(",")) for cell in cells] for cells in PAINTER.values()]
    return [[(p[r][0], p[r][1]) for p in pairs] for r in range(3)]


def test_means_are_over_pictures_and_then_over_raters(tmp_path: Path) -> None:
    scores = scored(*read_ratings(write(tmp_path))["Painter"])
    raters = {
        "sc": [mean(sc for sc, _ in rater) for rater in plain()],
        "pq": [mean(pq for _, pq in rater) for rater in plain()],
        "o_imagenhub": [mean(sqrt(sc * pq) for sc, pq in rater) for rater in plain()],
        "accuracy": [mean(float(sc == 1) for sc, _ in rater) for rater in plain()],
    }
    for name, means in raters.items():
        assert scores[name] == pytest.approx(mean(means))
        assert scores[f"{name}_std"] == pytest.approx(pstdev(means))
    assert scores["o_instruct_imagen"] == pytest.approx(sqrt(mean(raters["sc"]) * mean(raters["pq"])))
    assert scores["o_instruct_imagen"] > scores["o_imagenhub"] + 0.03  # the two forms differ


def test_a_model_that_copies_has_accuracy_one_and_no_o(tmp_path: Path) -> None:
    scores = scored(*read_ratings(write(tmp_path))["Copier"])
    assert scores["accuracy"] == 1 and scores["pq"] == scores["o_imagenhub"] == scores["o_instruct_imagen"] == 0
    assert scores["sc_ci"] == scores["o_instruct_imagen_ci"] == 0 and np.isnan(scores["sc_alpha"])


def test_fleiss_kappa_equals_the_agreement_of_all_pairs_of_raters() -> None:
    values = torch.tensor([[sc for sc, _ in rater] for rater in plain()]).T
    flat = values.flatten().tolist()
    agree = mean(float(a == b) for row in values.tolist() for a, b in combinations(row, 2))
    chance = sum((flat.count(level) / len(flat)) ** 2 for level in set(flat))
    assert float(fleiss_kappa(values)) == pytest.approx((agree - chance) / (1 - chance))


def test_krippendorff_alpha_equals_a_sum_over_all_pairs_of_ratings() -> None:
    values = torch.tensor([[pq for _, pq in rater] for rater in plain()]).T
    flat = values.flatten().tolist()

    def distance(a: float, b: float) -> float:
        between = sum(min(a, b) <= v <= max(a, b) for v in flat)
        return (between - (flat.count(a) + flat.count(b)) / 2) ** 2

    within = mean(distance(a, b) for row in values.tolist() for a, b in combinations(row, 2))
    assert float(krippendorff_alpha(values)) == pytest.approx(1 - within / mean(distance(a, b) for a, b in combinations(flat, 2)))


def test_raters_who_agree_always_score_one_and_chance_scores_nothing() -> None:
    column = torch.tensor([0.0, 0.5, 1.0, 1.0]).repeat(1000)
    same, shuffled = torch.stack([column] * 3, 1), torch.stack([column[torch.randperm(len(column))] for _ in range(3)], 1)
    for measure in (fleiss_kappa, krippendorff_alpha):
        assert float(measure(same)) == pytest.approx(1) and abs(float(measure(shuffled))) < 0.05


def test_merging_two_metrics_equals_one() -> None:
    sc, pq = (torch.randint(0, 3, (20, 3)) / 2 for _ in range(2))
    first, second = Ratings(), Ratings()
    first.update(sc[12:], pq[12:])
    second.update(sc[:12], pq[:12])
    first.merge_state(second)
    whole = scored(sc, pq)
    assert {name: float(value) for name, value in first.compute().items()} == pytest.approx(whole) and whole["o_instruct_imagen_ci"] > 0


def _score_a_part(rank: int, sc: torch.Tensor, pq: torch.Tensor, folder: Path) -> None:
    torch.set_num_threads(1)  # a pool of OpenMP does not survive a fork
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    part = slice(0, 5) if rank == 0 else slice(5, None)
    torch.save(scored(sc[part], pq[part]), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_with_parts_of_unequal_size_score_the_whole(tmp_path: Path) -> None:
    sc, pq = (torch.randint(0, 3, (20, 3)) / 2 for _ in range(2))
    torch.multiprocessing.start_processes(_score_a_part, (sc, pq, tmp_path), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    whole = scored(sc, pq)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(whole)


def test_a_single_rater_has_no_agreement() -> None:
    scores = scored(torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.5]))
    assert {n for n in scores if not n.endswith("_ci")} == {"sc", "pq", "accuracy", "o_imagenhub", "o_instruct_imagen"}
    assert scores["o_imagenhub"] == pytest.approx((sqrt(0.5) + 0.5) / 2)


def test_the_interval_of_a_function_of_means_follows_its_slope() -> None:
    both = torch.from_numpy(np.random.default_rng(0).random((400, 2)))
    width = interval(both, of=lambda means: means.sum(-1))  # the variance of a sum of independent means
    np.testing.assert_allclose(width, 1.96 * np.sqrt(2 / 12 / 400), rtol=0.15)


@pytest.mark.parametrize(
    ("sc", "pq", "says"),
    [([[1.0, 0.7]], [[1.0, 1.0]], "0, 0.5 or 1"), ([[1.0, 1.0]], [[1.0]], "same raters"), ([[1.0]], [[1.0]], "same raters")],
)
def test_ratings_off_the_scale_or_of_other_raters_are_refused(sc: list[list[float]], pq: list[list[float]], says: str) -> None:
    metric = Ratings()
    metric.update(torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match=says):
        metric.update(torch.tensor(sc), torch.tensor(pq))


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"c.jpg": "f.jpg"}, "rater3.tsv: does not rate the same pictures and models as .*rater1.tsv: c.jpg of Copier"),
        ({"Copier": "Other"}, "rater3.tsv: does not rate the same pictures and models as .*rater1.tsv: a.jpg of Copier"),
        ({"c.jpg": "b.jpg"}, "rater3.tsv: line 4: b.jpg again"),
        ({"uid": "picture"}, "rater3.tsv: line 2: no column uid"),
        ({"[0.5,0.5]": "[0.5,0.7]"}, r"rater3.tsv: line 3, column Painter: must be \[SC, PQ\], each 0, 0.5 or 1; it is '\[0.5,0.7\]'"),
        ({"[0.5,0.5]\t[1,0]": "[0.5,0.5]"}, "rater3.tsv: line 3, column Copier: must be .* it is None"),
        ({"[0.5,0.5]": "good"}, "rater3.tsv: line 3, column Painter: .* it is 'good'"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, edits: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_ratings(write(tmp_path, edits))
    with pytest.raises(ValueError, match="no files"):
        read_ratings([])


def test_files_in_another_order_of_pictures_give_the_same_ratings(tmp_path: Path) -> None:
    files = write(tmp_path)
    straight = read_ratings(files)
    head, *rows = files[1].read_text().splitlines()
    files[1].write_text("\n".join([head, *reversed(rows)]) + "\n")
    for model, (sc, pq) in read_ratings(files).items():
        assert torch.equal(sc, straight[model][0]) and torch.equal(pq, straight[model][1])

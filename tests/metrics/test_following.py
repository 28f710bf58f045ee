from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightning_mmgen.data.images import pixels
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.metrics import ToyboxFollowing
from lightning_mmgen.metrics.following import interval
from lightning_mmgen.prompt import Record
from lightning_mmgen.toybox.oracle import score
from lightning_mmgen.toybox.truth import Truth


def asked(task: str, count: int, held_out: bool = False) -> tuple[list[Record], Tensor, list[Truth]]:
    """Records, the pictures that they ask for, and the truths."""
    records = list(ToyboxSource({task: 1.0}, length=count, held_out=held_out))
    return records, torch.stack([pixels(r.target) for r in records if r.target is not None]), [r.extra["truth"] for r in records]


def scored(pictures: Tensor, truths: list[Truth]) -> dict[str, Tensor]:
    metric = ToyboxFollowing()
    metric.update(pictures, truths)
    return metric.compute()


def test_perfect_pictures_score_one() -> None:
    _, pictures, truths = asked("subject", 12, held_out=True)
    scores = scored(pictures, truths)
    assert scores["following"] == 1 and scores["strict"] == 1 and scores["consistency"] > 0.9
    assert scores["following_ci"] == 0


def test_pictures_of_other_instructions_score_less() -> None:
    _, pictures, truths = asked("subject", 12)
    right, wrong = scored(pictures, truths), scored(pictures.roll(1, 0), truths)
    assert wrong["following"] < 0.7 and wrong["strict"] < 0.2 and wrong["consistency"] < right["consistency"] - 0.3
    assert wrong["following_ci"] > 0


def test_the_scores_are_means_over_pictures() -> None:
    _, pictures, truths = asked("subject", 4)
    pictures = torch.cat([pictures[:2], pictures[:2]])
    each = [score(((p + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), t) for p, t in zip(pictures, truths, strict=True)]
    scores = scored(pictures, truths)
    np.testing.assert_allclose(scores["following"], np.mean([s.following for s in each]), rtol=1e-6)
    np.testing.assert_allclose(scores["strict"], np.mean([s.strict for s in each]), rtol=1e-6)
    np.testing.assert_allclose(scores["consistency"], np.mean([np.mean(s.consistency) for s in each]), rtol=1e-5)


def test_consistency_is_of_what_references_show() -> None:
    _, pictures, truths = asked("caption", 2)
    assert set(scored(pictures, truths)) == {"following", "following_ci", "strict", "strict_ci"}
    _, pictures, truths = asked("subject", 2)
    hidden = [replace(t, shown=()) for t in truths]
    assert "consistency" not in scored(pictures, hidden)


def test_merging_two_metrics_equals_one() -> None:
    _, pictures, truths = asked("subject", 6)
    pictures = pictures[[0, 1, 3, 2, 4, 5]]
    first, second = ToyboxFollowing(), ToyboxFollowing()
    first.update(pictures[:2], truths[:2])
    second.update(pictures[2:], truths[2:])
    first.merge_state(second)
    whole = scored(pictures, truths)
    assert 0 < whole["following"] < 1
    for name, value in first.compute().items():
        torch.testing.assert_close(value, whole[name])


def test_the_interval_shrinks_with_the_number_of_pictures() -> None:
    values = torch.from_numpy(np.random.default_rng(1).random(1600))
    widths = [float(interval(values[:n])) for n in (25, 100, 400, 1600)]
    for n, width in zip((25, 100, 400, 1600), widths, strict=True):
        np.testing.assert_allclose(width, 1.96 * np.sqrt(1 / 12 / n), rtol=0.2)
    assert interval(values) == interval(values)

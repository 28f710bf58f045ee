"""The alignment loss, its aggregations, and the Aligner."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lightning_mmgen.losses import ExponentialSchedule, aggregate, alignment, channels, min_max
from lightning_mmgen.losses.alignment import Aggregation
from lightning_mmgen.models.aligner import AlignerConfig


def test_min_max_brings_each_map_to_0_and_1_and_a_flat_one_to_0() -> None:
    maps = torch.rand(2, 3, 4, 5) * 7 - 2
    out = min_max(maps)
    for i in range(2):
        for j in range(3):
            own = maps[i, j]
            torch.testing.assert_close(out[i, j], (own - own.min()) / (own.max() - own.min() + 1e-6))
    assert not min_max(torch.full((1, 4, 5), 3.0)).any()


def test_the_error_of_a_word_is_the_mean_square_over_pixels() -> None:
    maps, targets = torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)
    maps[1, 0, 1], targets[1, 1, 3] = 1.0, 0.5
    assert alignment(maps, targets).tolist() == [0, 1.25 / 8]


def plain(maps: Tensor) -> Tensor:
    return maps.sum(1)


@pytest.mark.parametrize("how", get_args(Aggregation))
def test_layers_and_heads_are_aggregated_as_the_formulas_say(how: Aggregation) -> None:
    a, b = torch.rand(3, 2, 4, 4), torch.rand(3, 2, 4, 4)
    expected = {
        "mean": (plain(a) + plain(b)) / 2,
        "max": torch.maximum(plain(a), plain(b)),
        "layers_first": plain((a + b) / 2),
        "max_max": torch.maximum(a.amax(1), b.amax(1)),
        "flow_product": a.mean(1) * b.mean(1),
        "flow_sum": a.mean(1) + b.mean(1),
    }[how]
    aligners = [plain] * len(channels(how, [2, 2]))
    torch.testing.assert_close(aggregate([a, b], aligners, how), min_max(expected), rtol=1e-4, atol=1e-4)
    assert channels(how, [2, 2]) == {"mean": [2, 2], "max": [2, 2], "layers_first": [2]}.get(how, [1])


def test_a_product_of_many_layers_of_small_shares_does_not_vanish() -> None:
    layers = [torch.rand(1, 2, 4, 4) * 1e-4 for _ in range(32)]
    assert aggregate(layers, [plain], "flow_product").amax() > 0.99


def test_layers_of_different_heads_have_aligners_of_their_own_or_an_error() -> None:
    assert channels("mean", [2, 4]) == [2, 4] and channels("flow_sum", [2, 4]) == [1]
    with pytest.raises(ValueError, match=r"layers_first .* which have \[2, 4\] heads"):
        channels("layers_first", [2, 4])


@pytest.mark.parametrize(("variant", "blocks"), [("light", 2), ("paper", 3), ("deep", 5)])
@pytest.mark.parametrize("norm", ["instance", "batch", "group", "none"])
def test_an_aligner_has_its_blocks_and_norm(variant: Any, blocks: int, norm: Any) -> None:
    aligner = AlignerConfig(variant, 16, norm).build(heads=4)
    kinds = [type(m).__name__ for m in aligner.blocks]
    named = {"instance": "InstanceNorm2d", "batch": "BatchNorm2d", "group": "GroupNorm", "none": "Identity"}[norm]
    assert kinds == ["Conv2d", named, "ReLU6"] * blocks and not list(aligner.buffers())
    maps = torch.rand(3, 4, 8, 6)
    out = aligner(maps)
    assert out.shape == (3, 8, 6) and out.requires_grad
    assert torch.allclose(aligner(maps[:1])[0], out[0], atol=1e-5) == (norm != "batch")


@pytest.mark.parametrize("given", [{"variant": "huge"}, {"norm": "layer"}, {"width": 0}, {"norm": "group", "width": 12}])
def test_a_wrong_aligner_is_an_error(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="aligner: "):
        AlignerConfig(**given)


def test_the_weight_decays_as_the_paper_says() -> None:
    schedule = ExponentialSchedule(10.0, 2.0, 100)
    assert [schedule.at(t) for t in (0, 50, 100)] == pytest.approx([10, 10 * math.exp(-1), 10 * math.exp(-2)])
    assert ExponentialSchedule(10.0, 0.0, 1).at(99) == 10
    with pytest.raises(ValueError, match="steps must be 1 or more"):
        ExponentialSchedule(1.0, 1.0, 0)

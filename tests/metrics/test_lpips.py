from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, Dinov2Config, ResNetConfig

from lightning_mmgen.metrics import MaskedLPIPS


class Pyramid(nn.Module):
    """Two levels: the pixels, and a convolution of cells of 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Conv2d(3, 5, 4, stride=4)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        return [pictures, self.level(pictures)]


def pair(side: int = 16) -> tuple[Tensor, Tensor]:
    """Pictures and sources, each [2, 3, side, side]."""
    first, second = torch.rand(2, 2, 3, side, side) * 2 - 1
    return first, second


def corner(side: int = 16, covered: int = 6) -> Tensor:
    """Masks of the corner, [2, 1, side, side]."""
    masks = torch.zeros(2, 1, side, side)
    masks[..., :covered, :covered] = 1
    return masks


def scored(metric: MaskedLPIPS, pictures: Tensor, sources: Tensor, masks: Tensor) -> float:
    metric.update(pictures, sources, masks)
    return float(metric.compute())


def plain(levels: list[tuple[Tensor, Tensor]], masks: Tensor, weights: list[Tensor]) -> float:
    """Equation 1 cell by cell, over the cells of square feature maps [b, c, h, h] without a masked pixel."""
    scores = []
    for i, mask in enumerate(masks[:, 0].numpy()):
        total = 0.0
        for (first, second), weight in zip(levels, weights, strict=True):
            cell, cells = mask.shape[0] // first.shape[-1], []
            for y, x in np.ndindex(*first.shape[-2:]):
                if not mask[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].any():
                    a, b = first[i, :, y, x], second[i, :, y, x]
                    cells.append(float((weight * (a / a.norm() - b / b.norm()) ** 2).sum()))
            total += float(np.mean(cells))
        scores.append(total)
    return float(np.mean(scores))


@torch.no_grad()
def test_it_is_the_papers_formula_over_the_cells_outside_the_mask() -> None:
    (pictures, sources), masks, network = pair(), corner(), Pyramid()
    weights = [torch.rand(3), torch.rand(5)]
    levels = list(zip(network(torch.where(masks.bool(), sources, pictures)), network(sources), strict=True))
    for given in (weights, None):
        expected = plain(levels, masks, given or [torch.ones(3), torch.ones(5)])
        assert scored(MaskedLPIPS(network, given), pictures, sources, masks) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(params=["resnet", "dinov2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny one with pictures of 16 px, saved as it is published: a ResNet with its classifier."""
    resnet = ResNetConfig(embedding_size=4, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
    dino = Dinov2Config(**size, image_size=16, patch_size=4)
    model = AutoModelForImageClassification.from_config(resnet) if request.param == "resnet" else AutoModel.from_config(dino)
    model.save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_the_levels_of_a_named_backbone_are_the_stages_of_the_whole_model(folder: Path) -> None:
    (pictures, sources), masks = pair(), corner()
    model = AutoModel.from_pretrained(folder).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    def stages(given: Tensor) -> list[Tensor]:
        states = model(pixel_values=((given + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states[1:]
        if model.config.model_type == "resnet":
            return list(states)
        return [model.layernorm(s)[:, 1:].transpose(1, 2).reshape(2, 16, 4, 4) for s in states]

    levels = list(zip(stages(torch.where(masks.bool(), sources, pictures)), stages(sources), strict=True))
    assert len(levels) == 2
    expected = plain(levels, masks, [torch.ones(a.shape[1]) for a, _ in levels])
    assert scored(MaskedLPIPS(str(folder)).train(), pictures, sources, masks) == pytest.approx(expected, rel=1e-3)


def test_a_change_inside_the_mask_is_no_drift_and_one_outside_is(folder: Path) -> None:
    (pictures, sources), masks = pair(), corner()
    edited = torch.where(masks.bool(), pictures, sources)
    assert scored(MaskedLPIPS(str(folder)), edited, sources, masks) == 0
    edited[..., 12:, 12:] *= -1
    assert scored(MaskedLPIPS(str(folder)), edited, sources, masks) > 1e-4


def test_a_picture_with_a_level_without_a_cell_outside_is_left_out() -> None:
    (pictures, sources), masks, network = pair(), corner(), Pyramid()
    masks[0] = corner(covered=13)[0]
    masks[0, :, ::4, ::4] = 1  # pixels are outside, no cell is
    rest = scored(MaskedLPIPS(network), pictures[1:], sources[1:], masks[1:])
    assert scored(MaskedLPIPS(network), pictures, sources, masks) == pytest.approx(rest, rel=1e-5)
    assert np.isnan(scored(MaskedLPIPS(network), pictures[:1], sources[:1], masks[:1]))


def test_the_score_does_not_depend_on_how_the_pictures_are_cut_into_batches() -> None:
    (pictures, sources), masks, network = pair(), corner(), Pyramid()
    stream = MaskedLPIPS(network)
    for i in (1, 0):
        stream.update(pictures[i : i + 1], sources[i : i + 1], masks[i : i + 1])
    assert float(stream.compute()) == pytest.approx(scored(MaskedLPIPS(network), pictures, sources, masks), rel=1e-5)


def test_the_papers_networks_without_torchvision_are_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"^LPIPS with alex needs torchvision: pip install 'lightning_mmgen\[lpips\]'$"):
        MaskedLPIPS()


def test_a_model_that_is_no_backbone_is_an_error_of_one_line(clip: Path) -> None:
    with pytest.raises(ValueError, match=f"^{clip}: transformers has no backbone of a clip; .*$"):
        MaskedLPIPS(str(clip))

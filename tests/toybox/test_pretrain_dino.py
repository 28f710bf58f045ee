"""The toybox's DINO: its loss against a plain re-computation, and what the embedded one tells apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from lightning_mmgen.data.images import pixels
from lightning_mmgen.models.dino import Dino
from lightning_mmgen.toybox.pretrain import Views, contrast
from lightning_mmgen.toybox.truth import picture
from lightning_mmgen.toybox.world import BACKGROUNDS, STYLES, random_scene, random_toy


def test_views_are_those_of_one_scene_and_the_same_each_time() -> None:
    views = Views(8, 3, 32, 0.7)
    assert torch.equal(views[1], Views(4, 3, 32, 0.7)[1]) and not torch.equal(views[1], views[2])
    assert views[0].shape == (2, 3, 32, 32) and views[0].abs().max() <= 1
    whole = Views(8, 3, 64, 1.0)  # nothing is cropped: ground and style make the difference
    assert all(not torch.equal(*whole[i]) for i in range(8))


def test_contrast_is_the_plain_cross_entropy_over_all_other_views() -> None:
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    loss, accuracy = contrast(features, 0.5)
    losses, right = [], 0
    for i in range(6):
        near = {k: float(torch.dot(features[i], features[k]) / (features[i].norm() * features[k].norm())) for k in range(6) if k != i}
        other = (i + 3) % 6
        losses.append(-np.log(np.exp(near[other] / 0.5) / sum(np.exp(x / 0.5) for x in near.values())))
        right += max(near, key=lambda k: near[k]) == other
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5) and float(accuracy) == pytest.approx(right / 6)
    same = torch.eye(3).repeat(2, 1)
    assert float(contrast(same, 0.01)[0]) < 1e-6 and float(contrast(same, 0.01)[1]) == 1


def test_the_embedded_one_knows_toys_again_on_other_grounds_and_in_other_styles() -> None:
    """The identity term's case: an edit of all of the picture keeps its toys, or puts another in place of one."""
    rng, model = np.random.default_rng(0), Dino.from_pretrained("toybox/dino")
    sources, edits, others = [], [], []
    for _ in range(48):
        scene = random_scene(rng, held=True)
        style = str(rng.choice([s for s in STYLES if s != scene.style]))
        edit = replace(scene, style=style) if rng.random() < 0.5 else replace(scene, background=str(rng.choice(list(BACKGROUNDS))))
        first = scene.toys[0]
        swapped = replace(first, toy=random_toy(rng, avoid=(scene.background,)))
        for scenes, one in ((sources, scene), (edits, edit), (others, replace(edit, toys=(swapped, *scene.toys[1:])))):
            scenes.append(pixels(picture(one)))
    with torch.no_grad():
        source, edit, other = (normalize(model.cls(torch.stack(x)), dim=1) for x in (sources, edits, others))
    assert ((source * edit).sum(1) > (source * other).sum(1)).float().mean() > 0.95
    assert ((source @ edit.T).argmax(1) == torch.arange(48)).float().mean() > 0.85

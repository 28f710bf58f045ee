"""SC and PQ of toybox pictures by the oracle: what each kind of fault costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from lightning_mmgen.metrics import toybox_rating
from lightning_mmgen.metrics.following import unexplained
from lightning_mmgen.models.codec import CodecConfig
from lightning_mmgen.pipeline import to_pil
from lightning_mmgen.toybox.oracle import read
from lightning_mmgen.toybox.render import draw
from lightning_mmgen.toybox.truth import Truth
from lightning_mmgen.toybox.world import BACKGROUNDS, Placed, Scene, Toy, random_scene

Pictures = list[NDArray[np.uint8]]
TOY = Toy("star", "red", "striped", hue=3.0, pitch=1.7, phase=0.1, outline=0.05, aspect=0.1)
OTHER = Toy("ring", "blue", "solid", hue=-3.0, pitch=1.5, phase=0.0, outline=0.03, aspect=-0.1)
SCENE = Scene((Placed(TOY, "large", 17.0, 32.0), Placed(OTHER, "small", 47.0, 32.0)), "white", "flat", "left of")
ASKED = Truth(SCENE, sizes=True, style=True)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(3)
    return [random_scene(rng) for _ in range(20)]


@pytest.fixture(scope="module")
def rendered(scenes: list[Scene]) -> Pictures:
    return [draw(scene)[0] for scene in scenes]


def quality(pictures: Pictures) -> NDArray[Any]:
    """PQ of each picture; what is asked for does not matter to it."""
    return np.array([toybox_rating(picture, ASKED)[1] for picture in pictures])


def with_toy(**change: Any) -> NDArray[np.uint8]:
    """The scene with another first toy."""
    first, *rest = SCENE.toys
    return draw(replace(SCENE, toys=(replace(first, toy=replace(TOY, **change)), *rest)))[0]


def test_rendered_truths_have_sc_and_pq_one(scenes: list[Scene], rendered: Pictures) -> None:
    truths = [Truth(s, tuple((k, k + 1) for k in range(len(s.toys))), sizes=True, style=True) for s in scenes]
    ratings = np.array([toybox_rating(p, t) for p, t in zip(rendered, truths, strict=True)])
    assert toybox_rating(draw(SCENE)[0], ASKED) == (1, 1)
    assert (ratings == 1).mean(0).min() > 0.94
    others = np.array([toybox_rating(p, t) for p, t in zip(rendered[1:], truths, strict=False)])
    assert (others[:, 0] == 0).mean() > 0.9 and (others[:, 1] == 1).mean() > 0.94  # another picture, as well made


def test_sc_is_the_degree_of_the_least_satisfied_condition() -> None:
    assert toybox_rating(with_toy(colour="green"), ASKED) == (0.5, 1)  # the toy in part
    assert toybox_rating(with_toy(colour="green", shape="circle", texture="banded"), ASKED) == (0, 1)  # another toy
    assert toybox_rating(draw(replace(SCENE, background="yellow"))[0], ASKED) == (0, 1)
    assert toybox_rating(draw(replace(SCENE, style="pastel"))[0], ASKED) == (0, 1)
    assert toybox_rating(draw(replace(SCENE, toys=SCENE.toys[:1]))[0], ASKED) == (0, 1)
    swapped = tuple(replace(p, x=64 - p.x) for p in SCENE.toys)
    assert toybox_rating(draw(replace(SCENE, toys=swapped))[0], ASKED) == (0, 1)
    assert toybox_rating(draw(replace(SCENE, toys=swapped))[0], Truth(SCENE, place=False)) == (1, 1)


def test_another_toy_of_the_same_words_is_partly_the_one_shown() -> None:
    twin = with_toy(hue=-10.0, pitch=2.1, phase=-0.1, outline=0.11, aspect=-0.2)
    assert toybox_rating(twin, ASKED)[0] == 1
    assert toybox_rating(twin, replace(ASKED, shown=((0, 1),)))[0] == 0.5
    assert toybox_rating(twin, replace(ASKED, shown=((1, 1),)))[0] == 1  # the other toy was shown


def test_pictures_that_went_through_the_vae_are_mostly_clean(rendered: Pictures) -> None:
    codec = CodecConfig("toybox/vae", None).build()
    batch = torch.stack([torch.from_numpy(p).permute(2, 0, 1) / 127.5 - 1 for p in rendered])
    assert (quality([np.asarray(image) for image in to_pil(codec.decode(codec.encode(batch)))]) == 1).mean() > 0.85


def test_pq_falls_with_blur_and_with_noise(rendered: Pictures) -> None:
    rng = np.random.default_rng(0)
    few = rendered[:6]
    blurred = [quality([ndimage.gaussian_filter(p, (s, s, 0)) for p in few]).mean() for s in (0.01, 1, 6)]
    noisy = [quality([np.clip(p + rng.normal(0, s, p.shape), 0, 255).astype(np.uint8) for p in few]).mean() for s in (0, 16, 64)]
    for clean, slight, heavy in (blurred, noisy):
        assert clean > 0.9 and 0.3 < slight < 0.8 and heavy < 0.05


def test_noise_and_empty_pictures_have_no_quality() -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(4)]
    empty = [np.full((64, 64, 3), np.array(rgb) * 255 + 0.5, dtype=np.uint8) for rgb in BACKGROUNDS.values()]
    assert not quality(noise + empty).any()
    assert {toybox_rating(p, ASKED)[0] for p in noise + empty} == {0}


def test_the_unexplained_share_is_that_of_a_fault_over_the_toys_contrast() -> None:
    picture, ground = (draw(replace(SCENE, toys=toys))[0].astype(float) for toys in (SCENE.toys, ()))
    spoilt = picture.copy()
    spoilt[2:6, 2:40] -= 25  # too faint to be read as a toy
    expected = 25**2 * 4 * 38 * 3 / ((picture - ground) ** 2).sum()
    clean, fault = (unexplained(p, read(p)) for p in (picture.astype(np.uint8), spoilt.astype(np.uint8)))
    assert clean < 0.02 and fault - clean == pytest.approx(expected, rel=0.1)

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from lightning_mmgen.data.images import pixels
from lightning_mmgen.models.codec import CodecConfig
from lightning_mmgen.pipeline import to_pil
from lightning_mmgen.toybox.oracle import Reading, Seen, consistency, read, read_all, score
from lightning_mmgen.toybox.render import draw
from lightning_mmgen.toybox.truth import Truth, picture
from lightning_mmgen.toybox.world import Placed, Scene, Toy, random_scene, trait_error

Read = list[tuple[Scene, Reading]]


@pytest.fixture(scope="module")
def readings() -> Read:
    """300 random scenes and what the oracle reads in their pictures."""
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(300)]
    return list(zip(scenes, read_all(np.stack([draw(scene)[0] for scene in scenes])), strict=True))


def nearest(reading: Reading, placed: Placed) -> Seen:
    return min(reading.toys, key=lambda seen: np.hypot(seen.x - placed.x, seen.y - placed.y))


def shares(readings: Read) -> dict[str, float]:
    """For every attribute, the share of scenes or toys where it is read right."""
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for scene, reading in readings:
        right["count"].append(len(reading.toys) == len(scene.toys))
        right["background"].append(reading.background == scene.background)
        right["style"].append(reading.style == scene.style)
        for placed in scene.toys:
            seen = nearest(reading, placed)
            right["size"].append(seen.size == placed.size)
            for name in ("shape", "colour", "texture"):
                right[name].append(getattr(seen.toy, name) == getattr(placed.toy, name))
    return {name: float(np.mean(values)) for name, values in right.items()}


def test_pictures_are_read_together_as_they_are_one_by_one(readings: Read) -> None:
    assert [read(draw(scene)[0]) for scene, _ in readings[:40]] == [reading for _, reading in readings[:40]]


def test_every_attribute_is_read_right_in_99_of_100_scenes(readings: Read) -> None:
    assert {name: share for name, share in shares(readings).items() if share < 0.99} == {}


def test_attributes_are_read_right_in_pictures_that_went_through_the_vae(readings: Read) -> None:
    codec = CodecConfig("toybox/vae", None).build()
    scenes = [scene for scene, _ in readings]
    pictures = torch.stack([pixels(picture(scene)) for scene in scenes])
    back = [codec.decode(codec.encode(batch)) for batch in pictures.split(50)]
    arrays = np.stack([np.asarray(image) for batch in back for image in to_pil(batch)])
    seen = shares(list(zip(scenes, read_all(arrays), strict=True)))
    assert {name: share for name, share in seen.items() if share < 0.97} == {}


def test_traits_and_places_are_read_closely(readings: Read) -> None:
    errors: defaultdict[str, list[float]] = defaultdict(list)
    for scene, reading in readings:
        for placed in scene.toys:
            seen = nearest(reading, placed)
            errors["pixels"].append(float(np.hypot(seen.x - placed.x, seen.y - placed.y)))
            for name, value in placed.toy.traits().items():
                errors[name].append(trait_error(name, value, getattr(seen.toy, name)))
    bounds = {"hue": 0.01, "pitch": 0.06, "phase": 0.04, "outline": 0.08, "aspect": 0.03, "pixels": 0.25}
    assert {name: np.mean(values) for name, values in errors.items() if np.mean(values) > bounds[name]} == {}
    assert set(errors) == set(bounds)


def everything(scene: Scene) -> Truth:
    """All conditions stated, and every toy shown."""
    return Truth(scene, tuple((k, k + 1) for k in range(len(scene.toys))), sizes=True, style=True)


def test_a_picture_of_its_own_truth_scores_high(readings: Read) -> None:
    scores = [score(draw(scene)[0], everything(scene)) for scene, _ in readings[:20]]
    assert np.mean([s.following for s in scores]) > 0.99 and np.mean([s.strict for s in scores]) > 0.9
    assert np.mean([c for s in scores for c in s.consistency]) > 0.95


def test_a_picture_follows_another_truth_little(readings: Read) -> None:
    others = [score(draw(a)[0], everything(b)) for (a, _), (b, _) in zip(readings[:20], readings[1:21], strict=True)]
    assert np.mean([s.following for s in others]) < 0.3 and not any(s.strict for s in others)
    assert np.mean([c for s in others for c in s.consistency]) < 0.1


def with_toy(scene: Scene, toy: Toy) -> Scene:
    return replace(scene, toys=(replace(scene.toys[0], toy=toy), *scene.toys[1:]))


TOY = Toy("star", "red", "striped", hue=3.0, pitch=1.7, phase=0.1, outline=0.05, aspect=0.1)
SCENE = Scene((Placed(TOY, "large", 32.0, 32.0),), "white", "flat", "in the centre")


@pytest.mark.parametrize("change", [{"shape": "circle"}, {"colour": "blue"}, {"shape": "cross", "colour": "green"}])
def test_a_swapped_toy_has_no_consistency(change: dict[str, str]) -> None:
    swapped = score(draw(with_toy(SCENE, replace(TOY, **change)))[0], everything(SCENE))  # type: ignore[arg-type]
    assert swapped.consistency == (0.0,)
    assert {name for name, holds in swapped.conditions.items() if not holds} == {f"{name} 1" for name in change}


def test_a_toy_of_the_same_words_but_other_traits_is_less_consistent() -> None:
    twin = replace(TOY, hue=-10.0, pitch=2.1, phase=-0.1, outline=0.11, aspect=-0.2)
    same, other = (score(draw(with_toy(SCENE, toy))[0], everything(SCENE)) for toy in (TOY, twin))
    assert same.strict and other.strict
    assert same.consistency[0] > 0.95 and other.consistency[0] < 0.6


def test_an_empty_picture_is_read_without_toys() -> None:
    empty = np.full((64, 64, 3), 247, np.uint8)
    assert read(empty).background == "white" and read(empty).toys == ()
    result = score(empty, everything(SCENE))
    assert result.consistency == (0.0,) and not result.strict
    assert {name for name, holds in result.conditions.items() if holds} <= {"background", "style"}


def test_noise_and_a_second_toy_are_read_without_failing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert 0 <= score(noise, everything(SCENE)).following <= 1
    two = replace(SCENE, toys=(Placed(TOY, "small", 17, 32), Placed(replace(TOY, colour="blue"), "small", 47, 32)), place="left of")
    result = score(draw(two)[0], everything(SCENE))
    assert not result.conditions["place"] and result.conditions["shape 1"] and result.conditions["colour 1"]


def test_blobs_of_any_form_are_read_without_failing() -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        blurred = ndimage.gaussian_filter(rng.normal(size=(64, 64, 3)), (4, 4, 0))
        blobs = np.where(blurred > np.quantile(blurred, 0.8), rng.integers(0, 256, 3), 230).astype(np.uint8)
        assert 0 <= score(blobs, everything(SCENE)).following <= 1


def test_conditions_are_those_that_the_instruction_states() -> None:
    names = {"background", "shape 1", "colour 1", "texture 1", "place"}
    picture = draw(SCENE)[0]
    assert set(score(picture, Truth(SCENE)).conditions) == names and score(picture, Truth(SCENE)).consistency == ()
    assert set(score(picture, Truth(SCENE, sizes=True)).conditions) == names | {"size 1"}
    assert set(score(picture, Truth(SCENE, style=True)).conditions) == names | {"style"}


def test_consistency_is_one_minus_the_mean_error_over_the_ranges() -> None:
    seen = Seen(replace(TOY, hue=TOY.hue - 6, phase=TOY.phase - 0.15, aspect=TOY.aspect - 0.1), "small", 0, 0)
    assert consistency(TOY, seen) == pytest.approx(1 - (6 / 40 + 0.5 + 0.1 / 0.5) / 5)
    texture = Seen(replace(TOY, texture="solid"), "small", 0, 0)  # pitch and phase cannot be told
    assert consistency(TOY, texture) == pytest.approx(1 - 2 / 5)
    assert consistency(TOY, None) == 0 and consistency(TOY, Seen(replace(TOY, shape="ring"), "small", 0, 0)) == 0

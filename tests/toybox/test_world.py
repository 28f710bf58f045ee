from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL.Image import Image

from lightning_mmgen.data.crops import Cropping, CropRecipe
from lightning_mmgen.data.images import open_picture
from lightning_mmgen.prompt import Record
from lightning_mmgen.toybox.oracle import Reading, read
from lightning_mmgen.toybox.render import draw, portrait, signed_distance
from lightning_mmgen.toybox.tasks import COMPOSITIONS, TASKS, control_image, edit_session
from lightning_mmgen.toybox.truth import Truth, boxes
from lightning_mmgen.toybox.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    STYLES,
    TEXTURES,
    TRAITS,
    Placed,
    Scene,
    Toy,
    held_out,
    other_view,
    random_scene,
    trait_error,
)

PLAIN = Cropping(head_share=0, augmented_share=0, control_share=0)
TOY = Toy("star", "red", "striped", hue=3.0, pitch=1.7, phase=0.3, outline=0.05, aspect=0.1)
SCENE = Scene((Placed(TOY, "large", 32.0, 32.0),), "white", "flat", "in the centre")


def scenes(count: int, *, held: bool = False) -> list[Scene]:
    rng = np.random.default_rng(7)
    return [random_scene(rng, held=held) for _ in range(count)]


def truth(record: Record) -> Truth:
    assert isinstance(record.extra["truth"], Truth)
    return record.extra["truth"]


# -- scenes ----------------------------------------------------------------------------------------------------------------------


def test_scenes_stay_within_the_ranges_of_their_attributes_and_traits() -> None:
    for scene in scenes(200):
        toys = [p.toy for p in scene.toys]
        assert scene.background in BACKGROUNDS and scene.style in STYLES
        assert scene.background not in {t.colour for t in toys} and len({t.colour for t in toys}) == len(toys)
        for toy in toys:
            assert toy.shape in SHAPES and toy.texture in TEXTURES
            assert all(low <= getattr(toy, name) <= high for name, (low, high) in TRAITS.items())
            assert set(toy.traits()) == (set(TRAITS) - {"pitch", "phase"} if toy.texture == "solid" else set(TRAITS))


def test_training_and_held_out_scenes_share_no_combination() -> None:
    def combinations(held: bool) -> set[tuple[str, ...]]:
        return {tuple(sorted(p.toy.words() for p in scene.toys)) for scene in scenes(800, held=held)}

    training, evaluation = combinations(False), combinations(True)
    assert len(training) > 500 and len(evaluation) > 300 and not training & evaluation


def test_about_one_combination_in_ten_is_held_out_in_whatever_order() -> None:
    rng = np.random.default_rng(0)
    pairs = [tuple(p.toy for p in random_scene(rng, held=bool(i % 2), toys=2).toys) for i in range(40)]
    assert [held_out(pair) for pair in pairs] == [held_out(pair[::-1]) for pair in pairs] == [bool(i % 2) for i in range(40)]
    kinds = [(replace(TOY, shape=s, texture=t, colour=c),) for s in SHAPES for t in TEXTURES for c in COLOURS]
    assert 0.03 < np.mean([held_out(kind) for kind in kinds]) < 0.2


def test_a_caption_names_every_condition_and_no_trait() -> None:
    assert SCENE.caption() == "a large red striped star in the centre on a white background, flat style"
    assert SCENE.caption(["[ref#1] toy"], sizes=False, style=False) == "a [ref#1] toy in the centre on a white background"
    pair = replace(SCENE, toys=(SCENE.toys[0], Placed(replace(TOY, colour="blue", shape="ring"), "small", 47, 32)), place="left of")
    assert pair.caption(style=False) == "a large red striped star left of a small blue striped ring on a white background"


def test_another_view_shows_the_same_toy() -> None:
    view = other_view(np.random.default_rng(0), TOY)
    assert [p.toy for p in view.toys] == [TOY] and view.style == "flat" and view.background != TOY.colour


def test_trait_errors_are_over_the_range() -> None:
    assert trait_error("hue", -20, 20) == 1 and trait_error("hue", 3, 3) == 0 and trait_error("hue", -100, 100) == 1
    assert trait_error("phase", -0.05, 0.1) == pytest.approx(0.5) and trait_error("phase", -0.4, 0.4) == 1


# -- renderer --------------------------------------------------------------------------------------------------------------------


def test_the_renderer_is_deterministic() -> None:
    for scene in scenes(20):
        (picture, masks), (again, masks_again) = draw(scene), draw(scene)
        assert picture.dtype == np.uint8 and picture.shape == (64, 64, 3) and np.array_equal(picture, again)
        assert len(masks) == len(scene.toys) and all(np.array_equal(m, n) for m, n in zip(masks, masks_again, strict=True))


def test_every_attribute_and_trait_shows() -> None:
    picture = draw(SCENE)[0]
    toy = {"shape": "ring", "colour": "blue", "texture": "banded", "hue": 9.0, "pitch": 2.1, "phase": -0.1, "outline": 0.1, "aspect": -0.2}
    others = [replace(SCENE, toys=(replace(SCENE.toys[0], toy=replace(TOY, **{name: value})),)) for name, value in toy.items()]  # type: ignore[arg-type]
    others += [replace(SCENE, style=style) for style in STYLES[1:]] + [replace(SCENE, background="grey")]
    others += [replace(SCENE, toys=(replace(SCENE.toys[0], size="small"),))]
    for other in others:
        assert np.abs(draw(other)[0].astype(int) - picture).mean() > 0.2


def test_a_toy_leaves_the_rest_of_the_picture_alone() -> None:
    for scene in scenes(20):
        picture, masks = draw(replace(scene, style="flat"))
        ground = (np.array(BACKGROUNDS[scene.background]) * 255 + 0.5).astype(np.uint8)
        assert (picture[np.maximum.reduce(masks) == 0] == ground).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_distances_are_negative_inside_and_grow_outwards(shape: str) -> None:
    y, x = np.mgrid[-20:21, -20:21].astype(np.float32)
    d = signed_distance(shape, x, y, 10.0, 12.0)
    assert (d[np.maximum(abs(x) - 10, abs(y) - 12) > 0] > 0).all()
    assert d.min() < -2 and 200 < (d < 0).sum() < 500
    assert d[20, 40] == pytest.approx(10, rel=0.5) and np.abs(np.diff(d[:, 25:].clip(-3), axis=1)).max() < 1.7


def test_a_portrait_is_the_toy_alone() -> None:
    picture = portrait(TOY, "green")
    assert picture.shape == (48, 48, 3) and picture.dtype == np.uint8
    assert (picture[0, 0] == (np.array(BACKGROUNDS["green"]) * 255 + 0.5).astype(np.uint8)).all()
    assert (picture != picture[0, 0]).any(-1).mean() > 0.2


# -- tasks -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("held", [False, True])
def test_every_task_yields_valid_records(task: str, held: bool) -> None:
    for seed in range(8):
        record = TASKS[task](np.random.default_rng(seed), held)
        scene = truth(record).scene
        told = (scene.caption(), record.instruction, record.extra.get("told"))
        assert record.task == task and (record.caption is None or record.caption in told)
        assert (record.target is None) == (record.question is not None)
        for reference in record.references:
            assert isinstance(reference.image, Image) and min(open_picture(reference.image).size) >= 12
        if record.target is not None:
            assert np.array_equal(np.array(open_picture(record.target)), draw(scene)[0])
            assert all(b.phrase in (p.toy.words(), p.toy.shape, "toy") for b, p in zip(record.boxes, scene.toys, strict=True))
            assert all(b.start is None or record.instruction[b.start :].startswith(b.phrase) for b in record.boxes)
            assert all(0 <= b.left < b.right <= 64 and 0 <= b.top < b.bottom <= 64 for b in record.boxes)
        if not (task == "edit" and held):  # an edit may lead from the held-out to any other combination
            assert held_out(tuple(p.toy for p in scene.toys)) == held
        shown = CropRecipe(16, 16, cropping=PLAIN).compose(record, None, np.random.default_rng(0)) if task == "crops" else record
        assert all(k < len(scene.toys) and m in {r.marker for r in shown.references} for k, m in truth(record).shown)


def test_neighbours_show_what_the_captions_of_a_cluster_leave_out() -> None:
    said: dict[str, set[bool]] = {name: set() for name in ("wholly", "shape", "background", "style", "place", "size")}
    kinds = []
    for seed in range(90):
        record = TASKS["retrieval"](np.random.default_rng(seed), False)
        scene, caption = truth(record).scene, record.caption or ""
        toy, pictures = scene.toys[0].toy, [np.array(open_picture(r.image)) for r in record.references]
        shown = [read(p) for p in pictures if p.shape == (64, 64, 3)]  # the others are close-ups
        assert len(pictures) == 3 and record.instruction.endswith(f"Generate: {caption}")
        assert toy.words(tuple(toy.measures())) in (record.description or "")
        first, other = ((text or "").split()[1] for text in (record.description, record.foil))
        kinds.append(alike := first == other)  # foils have other sizes where pictures show them
        if alike:
            assert sum((one.background, one.style) == (scene.background, scene.style) for one in shown) >= len(shown) - 1  # the oracle errs
        else:
            assert len(shown) == 3 and sum(in_places(one, scene) for one in shown) >= 2
            assert scene.background in caption and scene.style in caption
        words = (toy.words(), f" {toy.shape} ", f"{scene.background} background", f"{scene.style} style", scene.place, scene.toys[0].size)
        for found, word in zip(said.values(), words, strict=True):
            found.add(word in caption)
    assert all(found == {True, False} for found in said.values()) and 0.5 < np.mean(kinds) < 0.8


def in_places(seen: Reading, scene: Scene) -> bool:
    """Whether toys are seen where a scene has its own, up to a few pixels."""
    near = [min((np.hypot(t.x - p.x, t.y - p.y) for t in seen.toys), default=64.0) for p in scene.toys]
    return max(near) < 5


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_shows_what_it_does_not_tell(name: str) -> None:
    for seed in range(20):
        record = COMPOSITIONS[name](np.random.default_rng(seed), True)
        asked, scene = truth(record), truth(record).scene
        by_role = {r.role: r for r in record.references}
        assert held_out(tuple(p.toy for p in scene.toys)) and [r.marker for r in record.references] == list(
            range(1, len(record.references) + 1)
        )
        assert asked.style == ("style" in by_role) and (asked.style or scene.style == "flat")
        assert scene.style not in record.instruction and asked.sizes == bool({"depth", "mask"} & set(by_role))
        if "subject" in by_role:
            subjects = [r for r in record.references if r.role == "subject"]
            assert [m for _, m in asked.shown] == [r.marker for r in subjects] and len(subjects) == len(scene.toys)
            assert not any(p.toy.colour in record.instruction.replace(scene.background, "") for p in scene.toys)
        else:
            assert not asked.shown and all(p.toy.words() in record.instruction for p in scene.toys)


def test_measures_are_the_traits_that_show_on_a_scale_of_ten() -> None:
    for seed in range(20):
        record = TASKS["measuring"](np.random.default_rng(seed), False)
        toy, words = truth(record).scene.toys[0].toy, (record.answer or "").split()
        assert words[::2] == list(toy.traits())
        for name, mark in zip(words[::2], words[1::2], strict=True):
            low, high = TRAITS[name]
            assert low + int(mark) * (high - low) / 10 <= toy.traits()[name] <= low + (int(mark) + 1) * (high - low) / 10


def test_boxes_enclose_their_toys() -> None:
    for scene in scenes(20):
        for box, placed, mask in zip(boxes(scene), scene.toys, draw(scene)[1], strict=True):
            left, top, right, bottom = map(int, box[1:5])
            inside = mask[top:bottom, left:right]
            assert (mask > 0.5).sum() == (inside > 0.5).sum()
            assert abs((left + right) / 2 - placed.x) < 3 and abs((top + bottom) / 2 - placed.y) < 3


def test_an_edit_changes_only_what_its_mask_covers() -> None:
    kinds = set()
    for seed in range(20):
        record = TASKS["edit"](np.random.default_rng(seed), False)
        assert record.target is not None and isinstance(record.mask, Image)
        before, after = (np.array(open_picture(p)) for p in (record.references[0].image, record.target))
        assert (before != after).any()
        mask, toys = np.array(record.mask), np.maximum.reduce(draw(record.extra["truth"].scene)[1])
        assert (before == after).all(-1)[mask == 0].all()
        kind = record.extra["truth"].edited.split()[0]
        kinds.add(kind)
        if kind == "background":  # toys stay
            assert (mask[toys == 1] == 0).all() and (mask[toys == 0] == 255).all() and (toys == 1).any()
        if kind == "style":
            assert (mask == 255).all()
    assert {"background", "style", "shape"} <= kinds


def test_a_session_goes_on_from_the_picture_before() -> None:
    session = edit_session(np.random.default_rng(3), False, 4)
    assert [r.turn for r in session] == [0, 1, 2, 3] and len({r.session for r in session}) == 1
    for earlier, later in zip(session, session[1:], strict=False):
        assert earlier.target is not None and later.source_caption == earlier.caption
        assert np.array_equal(np.array(earlier.target), np.array(later.references[0].image))


@pytest.mark.parametrize("kind", ["edge", "mask", "depth", "sketch"])
def test_control_images_show_the_layout(kind: str) -> None:
    image = np.array(control_image(SCENE, kind))
    assert image.shape == (64, 64) and image.dtype == np.uint8 and np.ptp(image) > 150
    rim = np.abs(draw(SCENE)[1][0] - 0.5) < 0.4
    if kind in ("edge", "sketch"):
        assert np.abs(image[rim].mean() - image[0, 0]) > 80
    if kind == "mask":
        assert np.array_equal(image > 127, draw(SCENE)[1][0] * 255 >= 128)

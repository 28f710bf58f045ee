from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from PIL.Image import Image
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

from lightning_mmgen.cli import main
from lightning_mmgen.data.controls import Depth, Edge, makers
from lightning_mmgen.data.crops import CropDataModule, Cropping, CropRecipe, Repeated, augment, place_of
from lightning_mmgen.data.order import Position, RecordDataset
from lightning_mmgen.data.recipe import BadRow
from lightning_mmgen.data.sources import JSONLSource, Source, ToyboxSource, write_jsonl
from lightning_mmgen.prompt import Box, Record, RecordError

DRAWS = 10_000
PLAIN = Cropping(head_share=0, augmented_share=0, control_share=0)


def scene() -> Image:
    """A picture of 40 x 40 px in which every pixel is its own colour."""
    y, x = np.mgrid[0:40, 0:40]
    return PILImage.fromarray(np.stack([x * 6, y * 6, (x + y) * 3], -1).astype(np.uint8))


def record(**changes: Any) -> Record:
    """A man and his dog, two scooters by one word, and the man's head."""
    text = "a man and his dog beside a man on two scooters"
    boxes = (
        Box("man", 2, 3, 12, 28, "person", 2),
        Box("man", 4, 3, 9, 9, "head", 2),
        Box("dog", 14, 15, 24, 29, start=14),
        Box("man", 26, 2, 34, 27, "person", 27),
        Box("scooters", 20, 20, 30, 29, start=38),
        Box("scooters", 28, 18, 39, 29, start=38),
    )
    return replace(Record(text, target=scene(), caption=text, boxes=boxes), **changes)


def recipe(cropping: Cropping = PLAIN) -> CropRecipe:
    return CropRecipe(16, 16, cropping=cropping)


def composed(cropping: Cropping, one: Record | None = None, draws: int = 1) -> list[Record]:
    made, one = recipe(cropping), one or record()
    return [made.compose(one, None, np.random.default_rng(i)) for i in range(draws)]


# -- prompts ---------------------------------------------------------------------------------------------------------------------


def test_each_crop_stands_before_its_word() -> None:
    out = composed(replace(PLAIN, crops_per_prompt=4))[0]
    assert out.instruction == "a [ref#1] man and his [ref#2] dog beside a [ref#3] man on two [ref#4] scooters"
    assert [r.phrase for r in out.references] == ["man", "dog", "man", "scooters"] and {r.role for r in out.references} == {"crop"}
    for reference, box in zip(out.references[:3], (record().boxes[i] for i in (0, 2, 3)), strict=True):
        assert isinstance(reference.image, Image)
        assert np.array_equal(np.asarray(reference.image), np.asarray(scene())[int(box[2]) : int(box[4]), int(box[1]) : int(box[3])])


def test_a_control_picture_comes_last_in_the_prompt_and_is_whole() -> None:
    out = composed(replace(PLAIN, crops_per_prompt=1, people_first=True, control_share=1, controls=("edge",)))[0]
    assert out.instruction.count("[ref#1]") == 1 and out.instruction.endswith(", in the layout of the [ref#2] edge")
    assert out.references[1].role == "edge" and isinstance(out.references[1].image, Image) and out.references[1].image.size == (40, 40)


def test_a_phrase_that_occurs_twice_is_found_where_its_box_says() -> None:
    boxes = record().boxes
    assert place_of(boxes[0], record()) == 2 and place_of(boxes[3], record()) == 27
    assert place_of(Box("man", 0, 0, 1, 1), record()) == 2  # without a place: the first
    prefixed = record(instruction="draw a man and his dog beside a man on two scooters")
    assert place_of(boxes[3], prefixed) == 32
    assert place_of(Box("cat", 0, 0, 1, 1), record()) is None
    assert place_of(Box("man", 0, 0, 1, 1), Record("a woman", target=scene())) is None  # words, not letters


def test_one_box_a_phrase_and_at_most_so_many_crops() -> None:
    used = Counter(len(r.references) for r in composed(PLAIN, draws=200))
    assert used == {3: 200}
    places = Counter(r.phrase for out in composed(PLAIN, draws=2000) for r in out.references)
    assert abs(places["man"] / 2000 - 1.5) < 0.05 and abs(places["dog"] / 2000 - 0.75) < 0.04  # 3 of 4 phrases, two of them "man"
    assert composed(replace(PLAIN, crops_per_prompt=0))[0].references == ()


def test_records_with_references_and_questions_stay() -> None:
    for one in (ToyboxSource({"subject": 1.0}).record(0), ToyboxSource({"question": 1.0}).record(0)):
        assert recipe(replace(PLAIN, control_share=1, controls=("edge",))).compose(one, None, np.random.default_rng(0)) is one


def test_the_square_that_is_drawn_is_where_the_boxes_are() -> None:
    wide = PILImage.new("RGB", (100, 40))
    wide.paste(scene(), (55, 0))
    boxes = (Box("dog", 60, 10, 80, 30), Box("cat", 85, 5, 95, 20), Box("sofa", 0, 0, 60, 40, mask=PILImage.new("L", (100, 40), 255)))
    text, controls = "a dog, a cat and a sofa.", {"depth": wide.resize((50, 20))}
    one = Record(text, target=wide, caption=text, boxes=boxes[:2], controls=controls)
    out = composed(replace(PLAIN, control_share=1, controls=("depth",)), one)[0]
    assert isinstance(out.target, Image) and np.array_equal(np.asarray(out.target), np.asarray(wide)[:, 58:98])  # (60 + 95 - 40) / 2
    assert out.instruction == "a [ref#1] dog, a [ref#2] cat and a sofa, in the layout of the [ref#3] depth"
    assert isinstance(out.references[0].image, Image) and isinstance(out.references[2].image, Image)
    assert np.array_equal(np.asarray(out.references[0].image), np.asarray(wide)[10:30, 60:80])
    assert out.references[2].image.size == (20, 20)
    all_three = composed(PLAIN, replace(one, boxes=boxes))[0]
    assert [r.phrase for r in all_three.references] == ["sofa"]  # from 28 to 68: half of the sofa, less than half of the dog, no cat
    assert all_three.boxes[0].left == -28 and isinstance(all_three.boxes[0].mask, Image) and all_three.boxes[0].mask.size == (40, 40)


def test_the_same_seed_gives_the_same_prompt() -> None:
    cropping = Cropping(controls=("edge",))
    a, b, c = (recipe(cropping)(record(), None, seed) for seed in (3, 3, 4))
    assert a.record.instruction == b.record.instruction and all(map(torch.equal, a.references, b.references))
    assert len(a.references) != len(c.references) or not all(map(torch.equal, a.references, c.references))


# -- rates, over 10,000 draws; 4 standard errors of a share are at most 0.02 ------------------------------------------------------


def near(count: int, of: int, share: float) -> bool:
    return abs(count / of - share) < 4 * (share * (1 - share) / of) ** 0.5 + 1e-9


def test_the_papers_rates_hold() -> None:
    defaults = Cropping()
    assert (defaults.crops_per_prompt, defaults.head_share, defaults.augmented_share, defaults.control_share) == (3, 0.7, 0.2, 0.3)
    one = record(boxes=record().boxes[:2], controls={k: scene() for k in ("edge", "depth", "sketch")})
    made, heads, augmented, controls = recipe(Cropping()), 0, 0, Counter[str]()
    whole = {size: np.asarray(scene().crop(box)) for size, box in {"head": (4, 3, 9, 9), "person": (2, 3, 12, 28)}.items()}
    for i in range(DRAWS):
        rng = np.random.default_rng(i)
        place, box = made.choose(one, rng)[0]
        heads += box.kind == "head"
        out = made.compose(one, None, np.random.default_rng(i))
        crop = np.asarray(out.references[0].image)
        augmented += not any(np.array_equal(crop, plain) for plain in whole.values())
        controls.update(r.role for r in out.references[1:])
        assert place == 2
    assert near(heads, DRAWS, 0.7)
    assert near(augmented, DRAWS, 0.2)
    assert near(sum(controls.values()), DRAWS, 0.3)
    assert all(near(controls[kind], sum(controls.values()), 1 / 3) for kind in ("edge", "depth", "sketch"))


def test_stage_two_takes_people_first() -> None:
    cropping = Cropping(crops_per_prompt=1, people_first=True, control_share=0, augmented_share=0)
    kinds = Counter(recipe(cropping).choose(record(), np.random.default_rng(i))[0][1].kind for i in range(DRAWS))
    assert set(kinds) == {"head", "person"} and near(kinds["head"], DRAWS, 0.35)  # only one of the two men has a head
    dog = record(boxes=record().boxes[2:3])
    assert recipe(cropping).choose(dog, np.random.default_rng(0))[0][1].phrase == "dog"


def test_each_augmentation_has_an_even_chance() -> None:
    picture, seen = scene(), Counter[str]()
    for i in range(DRAWS):
        out = np.asarray(augment(picture, np.random.default_rng(i), noise=1e-6)).astype(int)
        seen["crop"] += out.shape != (40, 40, 3)
        seen["grey"] += bool((out == out[..., :1]).all())
        if out.shape == (40, 40, 3) and not (out == out[..., :1]).all():
            seen["kept"] += 1
            seen["flip"] += bool(out[0, 0, 0] > out[0, -1, 0])
    # of 16 equally likely choices, the empty one goes to one of the four: 1/2 + 1/64 each
    assert near(seen["grey"], DRAWS, 33 / 64)
    assert abs(seen["crop"] / DRAWS - 33 / 64) < 0.03  # a crop may keep all
    assert near(seen["flip"], seen["kept"], (2 / 16 + 1 / 64) / (3 / 16 + 2 / 64))


def test_noise_has_the_strength_that_it_says() -> None:
    grey = PILImage.new("RGB", (64, 64), (128, 128, 128))
    drawn = [np.asarray(augment(grey, np.random.default_rng(i), smallest=1.0)) for i in range(400)]
    noisy = [float(d.std()) / 255 for d in drawn if (d != d[..., :1]).any()]  # in colour
    assert 0.09 < max(noisy) < 0.102 and abs(np.mean(noisy) - 0.05) < 0.01


def test_light_scales_all_channels_alike_along_one_direction_and_hazes_half() -> None:
    picture, hazy = PILImage.new("RGB", (24, 16), (100, 60, 40)), 0
    for i in range(400):
        out = np.asarray(augment(picture, np.random.default_rng(i), kinds=["light"])).astype(float)
        gains = (out[..., 0] - out[..., 1]) / 40  # a haze of white takes its share of this difference, and adds to all
        assert np.abs((out[..., 1] - out[..., 2]) / 20 - gains).max() < 0.11  # rounding
        veil = (out[..., 0] - 100 * gains).mean() / 255
        assert -0.02 < veil < 0.52 and gains.min() > 0.24 and gains.max() < 1.27
        hazy += veil > 0.02
        steps = np.diff(out[..., 0], axis=0)
        assert (np.ptp(steps, axis=1) <= 2).all()  # the ramp is straight: each row is as far from the next everywhere
    assert abs(hazy / 400 - 0.48) < 0.1


def test_kinds_of_augmentation_are_a_field() -> None:
    made = recipe(Cropping(augmented_share=1.0, augmentations=("flip",), head_share=0, control_share=0))
    out, plain = (r.compose(record(), None, np.random.default_rng(0)) for r in (made, recipe(PLAIN)))
    for flipped, whole in zip(out.references, plain.references, strict=True):
        assert np.array_equal(np.asarray(flipped.image), np.asarray(whole.image)[:, ::-1])
    with pytest.raises(ValueError, match="augmentations has 'blur'; there are crop, flip, noise, grey, light"):
        Cropping(augmentations=("crop", "blur"))
    with pytest.raises(ValueError, match="augmented_share must be 0 where there are no augmentations"):
        Cropping(augmentations=())


# -- data module -----------------------------------------------------------------------------------------------------------------


def file_of(folder: Path, records: list[Record]) -> str:
    return str(write_jsonl(records, folder))


def module(train: Source | str, **changes: Any) -> CropDataModule:
    data = CropDataModule(train, **{"target_size": 16, "reference_size": 16, "batch_size": 2, "controls": ("edge",), **changes})
    data.setup("fit")
    return data


def test_people_are_drawn_more_often(tmp_path: Path) -> None:
    path = file_of(tmp_path, [record(boxes=record().boxes[2:3])] * 6 + [record()] * 4)
    data = module(path, person_weight=3.0)
    assert isinstance(data.train, Repeated) and len(data.train) == 6 + 4 * 3
    drawn = Counter(data.train.row(i, epoch) for epoch in range(DRAWS // 18) for i in range(18))
    assert all(drawn[i] == DRAWS // 18 for i in range(6))
    assert all(abs(drawn[i] / (DRAWS // 18) - 3) < 0.25 for i in range(6, 10))
    assert len({tuple(data.train.row(i, e) for i in range(10, 18)) for e in range(5)}) > 1  # others each epoch
    with Path(path).open("a") as file:
        file.write('{"instruction": "a person", "target": "gone.png"}\n{"person"\n')  # no box; no JSON
    assert JSONLSource(path).with_people() == [6, 7, 8, 9] and ToyboxSource({"crops": 1.0}).with_people() == []
    with pytest.raises(ValueError, match="less than once"):
        Repeated(JSONLSource(path), [1], 0.5, 0)


def test_the_held_out_set_is_plain_and_fixed(tmp_path: Path) -> None:
    path = file_of(tmp_path, [record()] * 4)
    data = module(path, held_out=path, augmented_share=1.0, control_share=1.0)
    first, again = data.held_out_records(4), data.held_out_records(4)
    assert [r.instruction for r in first] == [r.instruction for r in again]
    assert all(len(r.references) == 3 and "layout" not in r.instruction for r in first)
    batch = next(iter(data.val_dataloader()))[0]
    assert batch.instructions == [r.instruction for r in first[:2]]
    assert len(next(iter(data.train_dataloader()))[0].markers[0]) == 4


def test_the_embedded_world_gives_crops_and_controls() -> None:
    data = module("toybox", held_out="toybox", control_share=1.0, controls=("edge", "depth", "sketch"))
    assert {r.task for r in data.held_out_records(3)} == {"crops"}
    item = RecordDataset(data.train, data.recipe, 0)[Position(0, 0)]
    assert not isinstance(item, BadRow) and item.record.references[-1].role in ("edge", "depth", "sketch")
    assert [r.phrase for r in item.record.references[:-1]] == [b.phrase for b in item.record.boxes]


BAD: dict[str, tuple[Record, str]] = {
    "box outside": (record(boxes=(Box("dog", 50, 50, 60, 60),)), "the box of 'dog' lies outside the target of 40 x 40 pixels"),
    "no depth": (record(), "no control picture of the kinds depth, and nothing here that makes one"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_say_why(name: str, tmp_path: Path) -> None:
    bad, reason = BAD[name]
    kinds = ("depth",) if name == "no depth" else ("edge",)
    with pytest.raises(RecordError, match=reason):
        module(file_of(tmp_path, [bad] * 3), controls=kinds, control_share=1.0)


def test_a_box_at_the_edge_is_cut_there_and_a_word_that_is_not_said_has_no_crop() -> None:
    out = composed(PLAIN, record(boxes=(Box("dog", -5, 20.5, 14.2, 40), Box("cat", 0, 0, 9, 9))))[0]
    assert len(out.references) == 1 and isinstance(out.references[0].image, Image) and out.references[0].image.size == (15, 20)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"head_share": 1.5}, "head_share must lie between 0 and 1, not 1.5"),
        ({"crops_per_prompt": -1}, "crops_per_prompt must be 0 or more, not -1"),
        ({"controls": ("pose",)}, "controls has 'pose'; there are edge, depth, sketch"),
    ],
)
def test_wrong_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cropping(**setting)


def test_a_segmented_object_stands_on_black() -> None:
    mask = PILImage.new("L", (40, 40))
    mask.paste(255, (16, 17, 22, 27))
    one = record(boxes=(Box("dog", 14, 15, 24, 29, mask=mask),))
    cut, whole = (np.asarray(composed(replace(PLAIN, segmented=s), one)[0].references[0].image) for s in (True, False))
    inside = np.asarray(mask)[15:29, 14:24] > 0
    assert (cut[inside] == whole[inside]).all() and (cut[~inside] == 0).all() and (whole[~inside] > 0).any()


# -- control pictures ------------------------------------------------------------------------------------------------------------


def test_edges_lie_where_the_colour_changes() -> None:
    picture = PILImage.new("RGB", (32, 32), "white")
    picture.paste((0, 0, 0), (8, 8, 24, 24))
    edges = np.asarray(Edge()(picture)).max(-1) > 0
    y, x = np.nonzero(edges)
    assert edges.sum() >= 56 and edges[10:22, 10:22].sum() == 0
    assert all(min(abs(v - 8), abs(v - 23)) <= 1 for v in (x.min(), x.max(), y.min(), y.max()))


def test_depth_is_the_models_own_on_the_pictures_size(tmp_path: Path) -> None:
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 8,
    }
    neck = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "is_hybrid": False}
    torch.manual_seed(0)
    model = DPTForDepthEstimation(DPTConfig(**small, **neck)).eval()
    model.save_pretrained(tmp_path)
    processor = DPTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    drawn = Depth(str(tmp_path))(scene())
    assert drawn.size == (40, 40)
    with torch.no_grad():
        out = model(**processor(scene(), return_tensors="pt")).predicted_depth
    depth = torch.nn.functional.interpolate(out[None], (40, 40), mode="bicubic", align_corners=False)[0, 0].numpy()
    wanted = (depth - depth.min()) / np.ptp(depth) * 255
    assert np.abs(np.asarray(drawn)[..., 0] - wanted).max() <= 1


def test_only_what_can_be_made_here_has_a_maker(tmp_path: Path) -> None:
    assert set(makers(("edge", "depth"), None)) == {"edge"}
    assert set(makers(("depth",), str(tmp_path))) == {"depth"}


# -- from stage 1 to stage 2 -----------------------------------------------------------------------------------------------------


def test_stage_two_begins_from_stage_ones_weights(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data.class_path=CropDataModule", "--data.init_args.train=toybox", "--data.init_args.held_out=toybox"]
    ema = "--trainer.callbacks+={class_path: EMA, init_args: {decay: 0.9}}"
    first = main(["fit", "-c", str(experiment), *data, ema])
    last = f"{first.trainer.log_dir}/checkpoints/last.ckpt"
    start = [f"--model.init_args.start={last}", "--model.init_args.schedule.warmup=1000000"]
    second = main(["fit", "-c", str(experiment), *data, *start, "--trainer.max_steps=1", "--trainer.logger.init_args.name=stage2"])
    mean = torch.load(last, weights_only=True)["callbacks"]["EMA"]["mean"]
    assert mean and second.trainer.global_step == 1
    for name, weight in second.model.trainable().items():
        assert torch.allclose(weight, mean[name], atol=1e-6), name
    with pytest.raises(FileNotFoundError, match="gone.ckpt: no such checkpoint"):
        main(["fit", "-c", str(experiment), "--model.init_args.start=gone.ckpt"])

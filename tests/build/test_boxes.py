from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lightning_mmgen.build.boxes import Thing, guess, head_of, look_up, mentions, read_boxes
from lightning_mmgen.build.captions import Found

FACE = ["nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder"]


def thing(category: str, side: float, left: float = 0.0) -> Thing:
    return Thing(category, (left, 0.0, left + side, side), None)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A hot dog and a dog", [("hot dog", "hot dog", 2, False), ("dog", "dog", 16, False)]),
        ("Two MEN and a baby elephant", [("person", "MEN", 4, True), ("elephant", "elephant", 19, False)]),
        ("a bus driver at the train station near stop signs", [("person", "driver", 6, False), ("stop sign", "stop signs", 39, True)]),
        ("skateboarding on a carpet", []),
        ("sheep, a knife; knives", [("sheep", "sheep", 0, True), ("knife", "knife", 9, False), ("knife", "knives", 16, True)]),
    ],
)
def test_categories_are_found_by_their_words(caption: str, words: list[Any]) -> None:
    assert mentions(caption) == words


def test_a_plural_takes_all_boxes_and_a_singular_the_largest() -> None:
    boxes = [thing("dog", 5), thing("dog", 9), thing("cat", 7), thing("dog", 7)]
    many = look_up("some dogs", boxes)
    assert many.found is not None and [f.box[2] for f in many.found] == [9, 7, 5] and many.dropped == {}
    one = look_up("a dog and a cat", boxes)
    assert one.found == (Found("dog", 2, (0, 0, 9, 9)), Found("cat", 12, (0, 0, 7, 7)))
    assert one.dropped == {"boxes beyond a singular": 2}


def test_a_word_that_occurs_twice_takes_two_boxes() -> None:
    caption = look_up("a dog chases another dog", [thing("dog", 5), thing("dog", 9), thing("dog", 7)])
    assert caption.found is not None
    assert [(f.start, f.box[2]) for f in caption.found] == [(2, 9), (21, 7)] and caption.dropped == {"boxes beyond a singular": 1}


def test_several_words_of_a_category_take_a_box_only_if_it_is_the_only_one() -> None:
    unclear = look_up("a man and a woman", [thing("person", 5), thing("person", 6)])
    assert unclear.found == () and unclear.dropped == {"boxes of an unclear word": 2}
    clear = look_up("a man, the batter", [thing("person", 5)])
    assert clear.found == (Found("man", 2, (0, 0, 5, 5), 1.0, True),)


def test_a_head_lies_around_the_face_and_inside_the_person() -> None:
    person = (0.0, 0.0, 100.0, 200.0)
    seen = [50, 40, 2, 45, 35, 2, 55, 35, 2, 40, 38, 1, 60, 38, 2, 20, 80, 2]
    head = head_of(seen, FACE, person)
    assert head == pytest.approx((32, 19.2, 68, 55.2))  # ears 20 px apart, so a side of 36 px around (50, 37.2)
    assert head_of(seen, FACE, (45.0, 30.0, 100.0, 200.0)) == pytest.approx((45, 30, 68, 55.2))
    profile = head_of([50, 40, 2, 48, 36, 2, 0, 0, 0, 62, 40, 2, 0, 0, 0, 20, 80, 2], FACE, person)
    assert profile is not None and profile[0] < 48 and profile[2] > 70
    assert head_of([50, 40, 2, *[0] * 12, 20, 80, 2], FACE, person) is None


def coco(folder: Path) -> Path:
    """Two pictures; instances, keypoints and captions."""
    folder.mkdir()
    images = [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 80} for i in (1, 2)]
    kinds = [{"id": 1, "name": "person", "keypoints": FACE}, {"id": 18, "name": "dog"}]
    boxes = [
        {"id": 5, "image_id": 1, "category_id": 1, "bbox": [10, 0, 40, 80]},
        {"id": 6, "image_id": 1, "category_id": 18, "bbox": [60, 20, 30, 30]},
        {"id": 7, "image_id": 1, "category_id": 18, "bbox": [0, 0, 100, 80], "iscrowd": 1},
        {"id": 8, "image_id": 2, "category_id": 18, "bbox": [5, 5, 50, 50]},
    ]
    points = [20, 10, 2, 18, 8, 2, 24, 8, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    texts = [(1, "A boy\nwith his  dog"), (1, "a skater"), (2, "a puppy"), (2, "nothing here")]
    captions = [{"image_id": i, "caption": text} for i, text in texts]
    files: dict[str, Any] = {
        "captions_val.json": {"images": images, "annotations": captions},
        "instances_val.json": {"images": images, "annotations": boxes, "categories": kinds},
        "person_keypoints_val.json": {"images": images, "annotations": [{**boxes[0], "keypoints": points}], "categories": kinds[:1]},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def test_coco_gives_a_caption_of_its_own_each_with_boxes_and_heads(tmp_path: Path) -> None:
    first, second = read_boxes(str(coco(tmp_path / "coco")))
    assert (first.image, first.frame) == ("1.png", (100, 80)) and second.image == "2.png"
    assert [c.text for c in (*first.captions, *second.captions)] == ["A boy with his dog", "a skater", "a puppy", "nothing here"]
    boy, dog = first.captions[0].found or ()
    assert (boy.phrase, boy.start, boy.box, boy.person) == ("boy", 2, (10, 0, 50, 80), True)
    assert boy.head is not None and boy.head[0] < 18 < 24 < boy.head[2]
    assert dog == Found("dog", 15, (60, 20, 90, 50))
    assert [c.found for c in second.captions] == [(Found("puppy", 2, (5, 5, 55, 55)),), ()]


def test_coco_takes_instances_and_captions_as_two_files(tmp_path: Path) -> None:
    folder = coco(tmp_path / "coco")
    scenes = read_boxes(str(folder / "instances_val.json"), captions=str(folder / "captions_val.json"))
    found = scenes[0].captions[0].found
    assert found is not None and [f.phrase for f in found] == ["boy", "dog"] and found[0].head is None


GRIT = {
    "key": "000",
    "caption": "a man with the red dog",
    "noun_chunks": [
        [0, 5, 0.1, 0.2, 0.5, 0.9, 0.8],
        [11, 22, 0.5, 0.5, 1.0, 1.0, 0.7],
        [30, 40, 0, 0, 1, 1, 0.5],
    ],
    "ref_exps": [[0, 22, 0.1, 0.2, 0.5, 0.9, 0.8]],
}


def test_grit_spans_become_phrases_from_jsonl_and_parquet(tmp_path: Path) -> None:
    rows = [GRIT, {**GRIT, "key": "001", "noun_chunks": None}, {**GRIT, "caption": "a dog", "noun_chunks": [[2, 5, 0, 0, 1, 1, 0.9]]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    scenes = read_boxes(str(tmp_path / "a.jsonl"))
    assert read_boxes(str(tmp_path / "a.parquet")) == scenes
    assert [(s.image, s.frame, len(s.captions)) for s in scenes] == [("000.jpg", (1, 1), 2), ("001.jpg", (1, 1), 1)]
    man = Found("man", 2, (0.1, 0.2, 0.5, 0.9), 0.8, True)
    assert scenes[0].captions[0].found == (man, Found("red dog", 15, (0.5, 0.5, 1.0, 1.0), 0.7))
    assert scenes[0].captions[0].dropped == {"boxes without words": 1}
    assert scenes[1].captions[0].found == (man._replace(phrase="man with the red dog"),)


def flickr30k(folder: Path) -> Path:
    (folder / "Sentences").mkdir(parents=True)
    (folder / "Annotations").mkdir()
    (folder / "Sentences" / "36.txt").write_text(
        "[/EN#1/people/clothing Two men] hold [/EN#2/other a ball] in [/EN#3/scene a park] .\\n"
        "[/EN#0/notvisual It] is [/EN#4/bodyparts/people a man 's arm] .\\n\\n".replace("\\n", "\n")
    )
    boxes = {1: [(1, 1, 20, 40), (31, 1, 50, 40)], 2: [(11, 11, 20, 20)], 4: [(5, 6, 7, 8)]}
    things = "".join(
        f"<object><name>{name}</name>{'<name>2</name>' if name == 4 else ''}<bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
        f"<ymax>{d}</ymax></bndbox></object>"
        for name, some in boxes.items()
        for a, b, c, d in some
    )
    things += "<object><name>3</name><scene>1</scene><nobndbox>1</nobndbox></object>"
    size = "<size><width>100</width><height>50</height><depth>3</depth></size>"
    (folder / "Annotations" / "36.xml").write_text(f"<annotation><filename>36.jpg</filename>{size}{things}</annotation>")
    return folder


def test_flickr30k_chains_have_several_boxes_and_stacked_types(tmp_path: Path) -> None:
    (scene,) = read_boxes(str(flickr30k(tmp_path / "flickr")))
    first, second = scene.captions
    assert (scene.image, scene.frame) == ("36.jpg", (100, 50))
    assert first.text == "Two men hold a ball in a park ." and second.text == "It is a man 's arm ."
    assert first.found == (
        Found("men", 4, (0, 0, 20, 40), 1.0, True),
        Found("men", 4, (30, 0, 50, 40), 1.0, True),
        Found("ball", 15, (10, 10, 20, 20)),
        Found("ball", 15, (4, 5, 7, 8)),
    )
    assert second.found == (Found("arm", 15, (4, 5, 7, 8)),)


def test_the_format_is_guessed_where_it_is_clear(tmp_path: Path) -> None:
    assert guess(flickr30k(tmp_path / "a")) == "flickr30k" and guess(coco(tmp_path / "b")) == "coco"
    (tmp_path / "x.parquet").touch()
    assert guess(tmp_path / "x.parquet") == "grit"
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(ValueError, match="--format cannot be guessed"):
        guess(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "{", r"a.jsonl:1: not JSON"),
        ("a.jsonl", '{"caption": "a dog"}', r"a.jsonl:1: is not a row of GRIT \(KeyError: 'key'\)"),
        ("a.jsonl", '{"key": "1", "caption": "a dog", "noun_chunks": [[0, 1]]}', r"a.jsonl:1: is not a row of GRIT"),
        ("a.json", "[", "a.json: not JSON"),
        ("a.json", '{"images": [{"id": 1}], "annotations": [{"caption": "a"}]}', "a.json: is not a COCO captions file"),
        ("a.json", '{"images": [], "annotations": [{"bbox": [1, 2, 3, 4], "id": 1}]}', "a.json: is not a COCO file"),
        ("a.json", '{"images": [], "annotations": []}', "holds no captioned pictures"),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        read_boxes(str(tmp_path / name))

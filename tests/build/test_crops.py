from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_mmgen.build.crops import COUNTS, deal
from lightning_mmgen.build.detector import Detection, Detector
from lightning_mmgen.build.phrases import Phrase
from lightning_mmgen.data.sources import JSONLSource
from lightning_mmgen.prompt import Box, Record
from lightning_mmgen.tools.main import main

LIMITS = ["--min-area", "4", "--max-share", "1"]
DROPPED = ("a singular", "an unclear word", "boxes without words", "another shape", "without area", "outside", "too small", "too large")


def noise(path: Path, seed: int, width: int = 60, height: int = 40) -> Image.Image:
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))
    image.save(path)
    return image


def rows(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def build(out: Path, *arguments: str) -> tuple[list[Record], dict[str, int]]:
    """Run ``mmgen build crops`` into ``out``; its records and its counts."""
    assert main(["build", "crops", "--out", str(out), *arguments]) == 0
    counts = json.loads((out / "counts.json").read_text())
    assert list(counts) == list(COUNTS)
    assert counts["boxes found"] == counts["boxes kept"] + sum(v for k, v in counts.items() if k.endswith(DROPPED))
    lost = [v for k, v in counts.items() if k.startswith("captions ") and k != "captions without phrases"]
    assert counts["captions"] == counts["records"] + sum(lost)
    records = list(JSONLSource(str(out / "records.jsonl"))) if counts["records"] else []
    return records, counts


# -- boxes that exist ---------------------------------------------------------------------------------------------------------


def grit(folder: Path, boxes: list[list[float]], caption: str = "a dog", **picture: int) -> list[str]:
    """One picture, one caption whose last word has the boxes; the arguments that build it."""
    folder.mkdir()
    noise(folder / "a.png", 0, **picture)
    spans = [[2, len(caption), *box, 1 - 0.1 * i] for i, box in enumerate(boxes)]
    file = rows(folder / "grit.jsonl", [{"image": "a.png", "caption": caption, "noun_chunks": spans}])
    return ["--images", str(folder), "--boxes", str(file), "--heads", "none"]


@pytest.mark.parametrize(
    ("box", "rule"),
    [
        ([1.1, 0.2, 1.5, 0.9], "boxes outside"),
        ([0.5, 0.2, 0.5, 0.9], "boxes without area"),
        ([0.5, 0.2, 0.4, 0.9], "boxes without area"),
        ([float("nan"), 0.2, 0.4, 0.9], "boxes without area"),
        ([0.0, 0.0, 0.1, 0.1], "boxes too small"),
        ([-9.0, 0.0, 0.1, 0.1], "boxes too small"),
        ([0.0, 0.0, 1.0, 0.8], "boxes too large"),
    ],
)
def test_a_box_is_dropped_by_its_rule(tmp_path: Path, box: list[float], rule: str) -> None:
    records, counts = build(tmp_path / "out", *grit(tmp_path / "in", [box], width=250, height=200))
    assert not records and counts[rule] == counts["boxes found"] == counts["captions without a box"] == 1


def test_the_limits_are_the_papers_and_can_be_moved(tmp_path: Path) -> None:
    boxes = [[0, 0, 0.75, 0.75], [0, 0, 0.74, 0.75], [0, 0, 0.75, 1], [0, 0, 0.755, 1]]  # 22,500 and 22,200 square pixels; 75 % and 75.5 %
    arguments = grit(tmp_path / "in", boxes, width=200, height=200)
    (record,), counts = build(tmp_path / "a", *arguments)
    assert [b[1:5] for b in record.boxes] == [(0, 0, 150, 150), (0, 0, 150, 200)]
    assert counts["boxes too small"] == counts["boxes too large"] == 1
    (record,), _ = build(tmp_path / "b", *arguments, "--min-area", "22000", "--max-share", "0.76")
    assert len(record.boxes) == 4


def test_a_record_is_the_plain_caption_with_clipped_boxes(tmp_path: Path) -> None:
    boxes = [[-0.5, 0.5, 0.5, 2.0], [0.25, 0.25, 0.75, 0.75]]
    (record,), counts = build(tmp_path / "out", *grit(tmp_path / "in", boxes, "a man", width=80), *LIMITS)
    assert (record.instruction, record.caption, record.task, record.id) == ("a man", "a man", "crops", "a")
    assert record.references == () and record.target == "pictures/a.png"
    assert record.boxes == (Box("man", 0, 20, 40, 40, "person", 2), Box("man", 20, 10, 60, 30, "person", 2))
    assert (tmp_path / "out" / "pictures" / "a.png").read_bytes() == (tmp_path / "in" / "a.png").read_bytes()
    assert counts["boxes kept"] == 2 and counts["phrases"] == 1
    assert main(["data", "check", str(tmp_path / "out" / "records.jsonl")]) == 0


def coco(folder: Path, width: int = 60, height: int = 40) -> list[str]:
    """A picture annotated at a size, a boy with a face and his dog, and three captions."""
    folder.mkdir()
    noise(folder / "1.png", 0)
    images = [{"id": 1, "file_name": "1.png", "width": width, "height": height}]
    names = ["nose", "left_eye", "right_eye"]
    kinds = [{"id": 1, "name": "person", "keypoints": names}, {"id": 2, "name": "dog"}]
    points = [15, 8, 2, 14, 6, 2, 16, 6, 2]
    things: list[dict[str, Any]] = [
        {"id": 5, "image_id": 1, "category_id": 1, "bbox": [10, 0, 10, 40], "keypoints": points},
        {"id": 6, "image_id": 1, "category_id": 2, "bbox": [30, 20, 20, 10]},
    ]
    texts = [{"image_id": 1, "caption": text} for text in ("a boy and his dog", "nothing", "one dog and two dogs")]
    content = {"images": images, "annotations": things + texts, "categories": kinds}
    (folder / "coco.json").write_text(json.dumps(content))
    return ["--images", str(folder), "--boxes", str(folder / "coco.json")]


def test_coco_gives_heads_behind_their_persons(tmp_path: Path) -> None:
    (first, second), counts = build(tmp_path / "out", *coco(tmp_path / "in"), *LIMITS)
    person, head, dog = first.boxes
    assert person == Box("boy", 10, 0, 20, 40, "person", 2) and dog == Box("dog", 30, 20, 50, 30, "", 14)
    assert (head.phrase, head.kind, head.start) == ("boy", "head", 2)
    assert person.left - 1 <= head.left < 14 and 16 < head.right <= person.right and head.top < 6 and 8 < head.bottom < 15
    assert (first.id, second.id) == ("1-0", "1-2") and counts["heads"] == 1 and counts["boxes of an unclear word"] == 0
    assert (second.boxes[0].phrase, second.boxes[0].start) == ("dog", 4)


def test_heads_can_be_left_out_or_limited(tmp_path: Path) -> None:
    arguments = coco(tmp_path / "in")
    assert build(tmp_path / "a", *arguments, *LIMITS, "--heads", "none")[1]["heads"] == 0
    assert build(tmp_path / "b", *arguments, *LIMITS, "--min-head-area", "4000")[1]["heads"] == 0


def test_boxes_follow_a_picture_that_was_made_smaller(tmp_path: Path) -> None:
    (first, _), _ = build(tmp_path / "out", *coco(tmp_path / "in", 120, 80), *LIMITS)
    assert first.boxes[-1] == Box("dog", 15, 10, 25, 15, "", 14)


def test_boxes_of_a_picture_of_another_shape_are_dropped(tmp_path: Path) -> None:
    _, counts = build(tmp_path / "out", *coco(tmp_path / "in", 40, 60), *LIMITS)
    assert counts["boxes of another shape"] == counts["boxes found"] == 3 and counts["records"] == 0


def test_boxes_are_of_the_upright_picture(tmp_path: Path) -> None:
    arguments = coco(tmp_path / "in")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    noise(tmp_path / "in" / "1.png", 0, 40, 60).save(tmp_path / "in" / "1.png", exif=exif)
    (first, _), counts = build(tmp_path / "out", *arguments, *LIMITS)
    assert counts["boxes of another shape"] == 0 and first.boxes[-1] == Box("dog", 30, 20, 50, 30, "", 14)


# -- detector and parser ------------------------------------------------------------------------------------------------------

CAPTIONS = {
    "a.png": ["the red man sees a big dog .", "a dog and his ball rides it"],
    "b.png": ["it sees a dog and a dog ."],
    "broken.png": ["the big dog rides a red ball ."],
    "c.png": ["sees up .", "", "the [ref#1] dog", "a woman holds two big dogs ."],
    "d.png": ["a man and his scooter sees it"],
}


@pytest.fixture(scope="module")
def detected(tmp_path_factory: pytest.TempPathFactory, grounding_dino: Path, english: Path) -> list[str]:
    """Five pictures, one of them broken, with nine captions; the arguments that build them."""
    folder = tmp_path_factory.mktemp("detected")
    for i, name in enumerate(CAPTIONS):
        noise(folder / name, i, 60 + i, 50 - i)
    (folder / "broken.png").write_bytes(b"not a picture")
    file = rows(folder / "captions.jsonl", [{"image": name, "caption": text} for name, texts in CAPTIONS.items() for text in texts])
    models = ["--detector", str(grounding_dino), "--parser", str(english), "--box-threshold", "0.05", "--text-threshold", "0.02"]
    return ["--images", str(folder), "--captions", str(file), *models, "--batch-size", "2", *LIMITS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, detected: list[str]) -> tuple[Path, list[Record], dict[str, int]]:
    """The build of those pictures in one run."""
    out = tmp_path_factory.mktemp("whole")
    return out, *build(out, *detected)


def test_captions_that_give_nothing_are_counted_and_never_stop_the_build(whole: tuple[Path, list[Record], dict[str, int]]) -> None:
    _, records, counts = whole
    assert counts["pictures"] == 5 and counts["pictures unreadable"] == counts["captions of unreadable pictures"] == 1
    assert counts["captions"] == 9 and counts["captions empty"] == counts["captions with a marker"] == 1
    assert counts["captions without phrases"] == 1 and counts["phrases"] == 10 and counts["heads"] > 0
    assert [r.id for r in records] == ["a-0", "a-1", "b", "c-3", "d"]


def test_boxes_are_the_detectors_for_the_phrases_of_the_caption(
    whole: tuple[Path, list[Record], dict[str, int]], detected: list[str], grounding_dino: Path
) -> None:
    out, records, _ = whole
    detector = Detector(str(grounding_dino), 0.05, 0.02)
    images = [Image.open(out / "pictures" / "a.png")] * 2
    found = detector.detect(images, [["red man", "big dog"], ["dog", "ball"]])
    for record, some, starts in zip(records[:2], found, [(4, 19), (2, 14)], strict=True):
        for phrase, start in enumerate(starts):
            mine = [b for b in record.boxes if b.start == start and b.kind != "head"]
            theirs = [(max(d.left, 0), max(d.top, 0), min(d.right, 60), min(d.bottom, 50)) for d in some if d.phrase == phrase]
            theirs = [box for box in theirs if box[2] > box[0] and box[3] > box[1] and (box[2] - box[0]) * (box[3] - box[1]) >= 4]
            assert np.allclose([b[1:5] for b in mine], theirs, atol=0.02)
    assert {b.kind for b in records[0].boxes if b.phrase == "red man"} == {"person", "head"}
    assert {b.kind for b in records[1].boxes} == {""}


def test_a_head_is_the_best_box_in_the_persons_crop(whole: tuple[Path, list[Record], dict[str, int]], grounding_dino: Path) -> None:
    out, records, _ = whole
    person, head = records[-1].boxes[:2]
    assert (person.kind, head.kind, head.phrase, head.start) == ("person", "head", "man", 2)
    left, top = int(person.left), int(person.top)
    crop = Image.open(out / "pictures" / "d.png").crop((left, top, int(np.ceil(person.right)), int(np.ceil(person.bottom))))
    best = Detector(str(grounding_dino), 0.05, 0.02).detect([crop], [["head"]])[0][0]
    assert person.left - 1 <= head.left < head.right <= person.right + 1 and person.top - 1 <= head.top < head.bottom <= person.bottom + 1
    middle = (head.left + head.right) / 2, (head.top + head.bottom) / 2
    assert max(best.left, 0) + left <= middle[0] <= best.right + left and max(best.top, 0) + top <= middle[1] <= best.bottom + top


def test_a_phrase_that_occurs_twice_shares_its_boxes(whole: tuple[Path, list[Record], dict[str, int]]) -> None:
    (record,) = [r for r in whole[1] if r.id == "b"]
    first, second = ([b for b in record.boxes if b.start == start] for start in (10, 20))
    assert first and second and not {b[1:5] for b in first} & {b[1:5] for b in second}
    assert abs(len(first) - len(second)) <= 3 and {b.phrase for b in record.boxes} == {"dog"}


def test_boxes_are_dealt_out_to_the_places_of_a_phrase_best_first() -> None:
    phrases = [Phrase("Dog", 2), Phrase("man", 8), Phrase("dog", 14)]
    detections = [Detection(index, i, 0, 9, 9, 1 - 0.1 * i) for i, index in enumerate([0, 1, 0, 0, 1])]
    found = deal(phrases, ["dog", "man"], detections)
    assert [(f.phrase, f.start, f.box[0]) for f in found] == [("Dog", 2, 0), ("dog", 14, 2), ("Dog", 2, 3), ("man", 8, 1), ("man", 8, 4)]
    assert [f.person for f in found] == [False, False, False, True, True] and found[1].score == 0.8


def test_a_detector_that_finds_nothing_gives_no_records(tmp_path: Path, detected: list[str]) -> None:
    records, counts = build(tmp_path / "out", *detected, "--box-threshold", "1")
    assert not records and counts["boxes found"] == 0 and counts["captions without a box"] == 6


def test_a_killed_build_goes_on_and_equals_one_that_was_not(
    tmp_path: Path, whole: tuple[Path, list[Record], dict[str, int]], detected: list[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    lines = (out / "journal.jsonl").read_text().splitlines(keepends=True)
    (out / "journal.jsonl").write_text("".join(lines[:2]) + lines[2][:40])  # killed as it wrote the second of three batches
    for name in ("records.jsonl", "counts.json", "pictures/d.png"):
        (out / name).unlink()
    _, counts = build(out, *detected)
    assert counts == whole[2] and (out / "pictures" / "d.png").is_file()
    assert (out / "records.jsonl").read_bytes() == (whole[0] / "records.jsonl").read_bytes()


def test_shards_and_workers_give_the_same_records(
    tmp_path: Path, whole: tuple[Path, list[Record], dict[str, int]], detected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["build", "crops", "--out", str(out), *detected, "--shard", "1/2", "--workers", "1"]) == 0
    assert "the other shards are not done yet" in capsys.readouterr().out
    assert main(["build", "crops", "--out", str(out), *detected, "--shard", "0/2"]) == 0
    told = capsys.readouterr().out
    assert str(out / "records.jsonl") in told and "boxes too small" in told
    assert sorted((out / "records.jsonl").read_text().splitlines()) == sorted((whole[0] / "records.jsonl").read_text().splitlines())
    assert json.loads((out / "counts.json").read_text()) == whole[2]


# -- captions, and errors -----------------------------------------------------------------------------------------------------


def texts_beside(folder: Path) -> list[str]:
    (folder / "sub").mkdir(parents=True)
    noise(folder / "sub" / "a.png", 0)
    (folder / "sub" / "a.txt").write_text("the red man\nsees a big dog .\n")
    noise(folder / "without.png", 1)
    return ["--images", str(folder)]


def coco_captions(folder: Path) -> list[str]:
    (folder / "sub").mkdir(parents=True)
    noise(folder / "sub" / "a.png", 0)
    content = {"images": [{"id": 3, "file_name": "sub/a.png"}, {"id": 4, "file_name": "b.png"}]}
    (folder / "c.json").write_text(json.dumps({**content, "annotations": [{"image_id": 3, "caption": " the red man sees a big dog . "}]}))
    return ["--images", str(folder), "--captions", str(folder / "c.json")]


@pytest.mark.parametrize("make", [texts_beside, coco_captions])
def test_captions_may_lie_beside_the_pictures_or_in_a_coco_file(
    tmp_path: Path, make: Callable[[Path], list[str]], grounding_dino: Path, english: Path
) -> None:
    models = ["--detector", str(grounding_dino), "--parser", str(english), "--box-threshold", "0.05", "--text-threshold", "0.02"]
    (record,), counts = build(tmp_path / "out", *make(tmp_path / "in"), *models, *LIMITS, "--heads", "none")
    assert (record.id, record.target, record.caption) == ("sub/a", "pictures/sub/a.png", "the red man sees a big dog .")
    assert counts["pictures"] == counts["captions"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "keypoints"], "--heads keypoints needs --boxes of COCO"),
        (["--batch-size", "0"], "--batch-size 0 must be 1 or more"),
        (["--max-share", "1.5"], "--max-share above 0 and at most 1"),
        (["--shard", "2/2"], "--shard '2/2'"),
        (["--captions", "in/none.json"], "none.json"),
        (["--captions", "rows/bad.jsonl"], "bad.jsonl:2: needs the strings image and caption"),
        ([], "in: holds no captions"),
        (["--images", "nowhere"], "nowhere: no such folder"),
        (["--boxes", "in/none"], "in/none: no such file or folder"),
        (["--boxes", "rows/good.jsonl", "--captions", "rows/good.jsonl"], "boxes of grit have captions of their own"),
        (["--boxes", "in"], "--format cannot be guessed"),
        (["--captions", "rows/good.jsonl", "--parser", "./none"], "./none: no such spaCy pipeline"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    noise(Path("in/a.png"), 0)
    Path("rows").mkdir()
    good = {"image": "a.png", "caption": "a dog"}
    rows(Path("rows/good.jsonl"), [good])
    rows(Path("rows/bad.jsonl"), [good, {"image": "a.png"}])
    assert main(["build", "crops", "--images", "in", "--out", "out", *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("error: ") and "\n" not in error


def test_a_build_goes_on_only_with_the_same_captions_and_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = grit(tmp_path / "in", [[0, 0, 0.5, 0.5]])
    build(tmp_path / "out", *arguments)
    assert main(["build", "crops", "--out", str(tmp_path / "out"), *arguments, "--min-area", "5"]) == 1
    assert "begun with other settings (min_area)" in capsys.readouterr().err
    rows(tmp_path / "in" / "grit.jsonl", [{"image": "a.png", "caption": "a cat", "noun_chunks": []}])
    assert main(["build", "crops", "--out", str(tmp_path / "out"), *arguments]) == 1
    assert "begun with other settings (captions and boxes)" in capsys.readouterr().err

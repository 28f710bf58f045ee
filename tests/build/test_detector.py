from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_mmgen.build.detector import Detection, Detector

PHRASES = [["Man", "big dog", "red scooter"], ["red dogs", "woman"]]


def noise(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def close(a: list[Detection], b: list[Detection]) -> bool:
    return [d.phrase for d in a] == [d.phrase for d in b] and np.allclose([d[1:] for d in a], [d[1:] for d in b], atol=1e-3)


@pytest.fixture(scope="module")
def everything(grounding_dino: Path) -> Detector:
    """It keeps each of the 12 object queries of an image."""
    return Detector(str(grounding_dino), box_threshold=0.0, text_threshold=0.0)


def test_boxes_scores_and_phrases_are_those_of_the_librarys_post_processing(grounding_dino: Path) -> None:
    detector = Detector(str(grounding_dino), box_threshold=0.6, text_threshold=0.5)
    images = [noise(0), noise(1, 50, 45)]
    found = detector.detect(images, PHRASES)
    inputs = detector.processor(images=images, text=["man. big dog. red scooter.", "red dogs. woman."], return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = detector.model(**inputs)
    sizes = [(image.height, image.width) for image in images]
    theirs = detector.processor.post_process_grounded_object_detection(outputs, inputs.input_ids, 0.6, 0.5, sizes)
    assert 0 < sum(map(len, found)) <= sum(len(t["scores"]) for t in theirs) < 24
    for mine, their, phrases in zip(found, theirs, PHRASES, strict=True):
        words = [re.sub(r"\.|##|\[SEP\]", " ", text).split() for text in their["text_labels"]]
        rows = dict(zip(map(tuple, their["boxes"].tolist()), zip(their["scores"].tolist(), words, strict=True), strict=True))
        named = {box for box, (_, words) in rows.items() if words}
        assert [d.score for d in mine] == sorted((d.score for d in mine), reverse=True)
        assert len(mine) == len(named)
        for d in mine:
            score, words = next(rows[box] for box in named if np.allclose(box, d[1:5], atol=1e-3))
            assert d.score == pytest.approx(score, abs=1e-5)
            assert any(word in " ".join(words) for word in phrases[d.phrase].lower().split())


def test_a_box_belongs_to_the_phrase_whose_token_scores_highest(everything: Detector, grounding_dino: Path) -> None:
    (found,) = everything.detect([noise(3)], [PHRASES[0]])
    inputs = everything.processor(images=[noise(3)], text=["man. big dog. red scooter."], return_tensors="pt")
    with torch.no_grad():
        scores = everything.model(**inputs).logits.sigmoid()[0]
    words = everything.processor.tokenizer.convert_ids_to_tokens(inputs.input_ids[0])
    assert words == ["[CLS]", "man", ".", "big", "dog", ".", "red", "scooter", ".", "[SEP]"]
    best = sorted(zip(scores.amax(-1).tolist(), scores[:, [1, 3, 4, 6, 7]].argmax(-1).tolist(), strict=True), reverse=True)
    assert [d.phrase for d in found] == [[0, 1, 1, 2, 2][token] for _, token in best]
    assert len({d.phrase for d in found}) > 1
    sure = int((scores[:, [1, 3, 4, 6, 7]].amax(-1) > 0.5).sum())
    assert 0 < sure < 12 and len(Detector(str(grounding_dino), 0.0, 0.5).detect([noise(3)], [PHRASES[0]])[0]) == sure


def test_phrases_beyond_the_text_limit_are_asked_in_several_texts(everything: Detector) -> None:
    many = ["red ball", "big dog", "man", "scooter", "woman", "big red scooter", "big man", "red dog", "ball", "dog"]
    queries = everything.queries(many)
    lengths = [len(everything.processor.tokenizer(q.text).input_ids) for q in queries]
    assert len(queries) == 2 and max(lengths) <= 24
    assert [q.text[a:b] for q in queries for _, a, b in q.spans] == many
    assert [i for q in queries for i, _, _ in q.spans] == list(range(10))
    first = len(queries[0].spans)
    apart = everything.detect([noise(4)], [many[:first]])[0]
    apart += [d._replace(phrase=d.phrase + first) for d in everything.detect([noise(4)], [many[first:]])[0]]
    assert close(everything.detect([noise(4)], [many])[0], sorted(apart, key=lambda d: -d.score))


def test_a_phrase_longer_than_the_limit_is_cut(everything: Detector) -> None:
    (query,) = everything.queries(["red " * 40 + "ball"])
    assert len(query.spans) == 1
    assert {d.phrase for d in everything.detect([noise(4)], [["red " * 40 + "ball"]])[0]} == {0}


def test_a_batch_finds_what_each_image_finds_alone(everything: Detector) -> None:
    images = [noise(5), noise(6)]
    together = everything.detect(images, PHRASES)
    for image, phrases, found in zip(images, PHRASES, together, strict=True):
        assert close(everything.detect([image], [phrases])[0], found)


def test_marks_that_separate_phrases_do_not_cut_one(everything: Detector) -> None:
    (query,) = everything.queries(["...", "st. Bernard?", " ", "man"])
    assert query.text == "st bernard. man." and query.spans == [(1, 0, 10), (3, 12, 15)]


def test_nothing_is_found_without_phrases_or_over_a_high_threshold(grounding_dino: Path, everything: Detector) -> None:
    assert everything.detect([noise(7), noise(8)], [[], ["."]]) == [[], []]
    assert everything.detect([], []) == []
    assert Detector(str(grounding_dino), box_threshold=1.0).detect([noise(7)], [["man"]]) == [[]]


def test_another_model_and_a_missing_folder_are_refused(clip: Path) -> None:
    with pytest.raises(ValueError, match="is a clip, not a grounding-dino"):
        Detector(str(clip))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Detector("./nowhere")

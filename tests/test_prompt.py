from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image as PILImage

from lightning_mmgen.prompt import Box, MultimodalPrompt, Record, RecordError, Reference, Segment, from_json, split

ROW: dict[str, Any] = {
    "version": 1,
    "instruction": "a [ref#1] cat on [ref#2]",
    "references": [
        {"marker": 1, "image": "cat.png", "phrase": "cat", "role": "subject"},
        {"marker": 2, "image": "sofa.png", "phrase": "", "role": "crop"},
    ],
    "target": "target.png",
    "caption": "a cat on a sofa",
    "source_caption": "a sofa",
    "description": "a grey cat asleep on a red sofa, seen from above",
    "foil": "a grey cat asleep on a red sofa, seen from below",
    "task": "subject",
    "mask": "mask.png",
    "boxes": [("cat", 1, 2.5, 30, 40), {"phrase": "man", "left": 0, "top": 0, "right": 9, "bottom": 9, "kind": "head", "start": 3}],
    "controls": {"depth": "depth.png", "edge": None},
    "session": "s1",
    "turn": 0,
    "id": "row-1",
}


def test_a_record_comes_back_from_json_unchanged() -> None:
    record = from_json(ROW)
    assert record.references[0] == Reference(1, "cat.png", "cat", "subject")
    assert record.boxes == (Box("cat", 1, 2.5, 30, 40), Box("man", 0, 0, 9, 9, "head", 3))
    assert record.controls == {"depth": "depth.png"}
    assert record.to_json()["boxes"][0] == {"phrase": "cat", "left": 1, "top": 2.5, "right": 30, "bottom": 40}
    assert record.turn == 0 and record.id == "row-1" and record.mask == "mask.png"
    assert from_json(json.loads(json.dumps(record.to_json()))) == record


def test_a_question_comes_back_from_json_unchanged() -> None:
    record = Record("[ref#1]", (Reference(1, "a.png"),), question="what is this?", answer="a cat")
    assert from_json(json.loads(json.dumps(record.to_json()))) == record
    assert record.prompt().instruction == "[ref#1] what is this?"


def test_empty_fields_are_left_out_of_json_and_null_is_absent() -> None:
    row = Record("draw", target="a.png").to_json()
    assert row == {"version": 1, "instruction": "draw", "target": "a.png", "task": "instruct"}
    assert from_json({**row, "caption": None, "references": None, "turn": None}) == Record("draw", target="a.png")


def test_a_picture_column_gives_bytes_or_else_the_path() -> None:
    assert from_json({"instruction": "draw", "target": {"bytes": b"png", "path": "a.png"}}).target == b"png"
    assert from_json({"instruction": "draw", "target": {"bytes": None, "path": "a.png"}}).target == "a.png"


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"instruction": "  "}, "instruction is empty"),
    ({"target": None}, "target is missing"),
    ({"colour": "red"}, "unknown key 'colour'"),
    ({"extra": {}}, "unknown key 'extra'"),
    ({"version": 2}, "version 2 is not 1"),
    ({"caption": 3}, "caption must be a string, not int"),
    ({"instruction": ["draw"]}, "instruction must be a string, not list"),
    ({"turn": -1}, "turn must be an integer, 0 or more"),
    ({"turn": True}, "turn must be an integer, 0 or more"),
    ({"turn": None}, "session and turn go together"),
    ({"question": "what?"}, "question and answer go together"),
    ({"answer": "a cat"}, "question and answer go together"),
    ({"target": 7}, "target must be a path or the bytes of a picture"),
    ({"mask": ""}, "mask must be a path or the bytes of a picture"),
    ({"target": {"bytes": None, "path": None}}, "target must be a path or the bytes of a picture"),
    ({"references": "cat.png"}, "references must be a list"),
    ({"references": ["cat.png"]}, "references[0] must be an object"),
    ({"references": [{"marker": 1, "image": "a.png", "size": 2}]}, "references[0] has an unknown key 'size'"),
    ({"references": [{"marker": 0, "image": "a.png"}]}, "references[0].marker must be an integer, 1 or more"),
    ({"references": [{"marker": "1", "image": "a.png"}]}, "references[0].marker must be an integer, 1 or more"),
    ({"references": [{"marker": True, "image": "a.png"}]}, "references[0].marker must be an integer, 1 or more"),
    ({"references": [{"marker": 1}]}, "references[0].image must be a path or the bytes of a picture"),
    ({"references": [{"marker": 1, "image": "a.png", "phrase": 3}]}, "references[0].phrase must be a string"),
    ({"references": [{"marker": 1, "image": "a.png"}]}, "marker [ref#2] has no reference"),
    ({"instruction": "a [ref#1] cat"}, "reference 2 has no marker [ref#2] in the instruction"),
    ({"references": [{"marker": 1, "image": "a.png"}, {"marker": 1, "image": "b.png"}]}, "references share a marker: [1, 1]"),
    ({"boxes": [["cat", 1, 2, 3]]}, "boxes[0] needs phrase, left, top, right, bottom"),
    ({"boxes": [{"phrase": "cat", "x": 1}]}, "boxes[0] needs phrase, left, top, right, bottom"),
    ({"boxes": [3]}, "boxes[0] needs phrase, left, top, right, bottom"),
    ({"boxes": [["cat", 5, 2, 5, 4]]}, "boxes[0] has no area"),
    ({"boxes": [["cat", 1, 2, 5, 4, "cat"]]}, "boxes[0].kind 'cat' is not one of person, head"),
    ({"boxes": [["cat", 1, 2, 5, 4, "", -1]]}, "boxes[0].start must be an integer, 0 or more"),
    ({"boxes": [["cat", 1, 2, 5, 4, "", 0, 3]]}, "boxes[0].mask must be a path or the bytes of a picture"),
    ({"controls": ["a.png"]}, "controls must be an object"),
    ({"controls": {"pose": "a.png"}}, "controls has an unknown key 'pose'; there are edge, depth, sketch"),
    ({"boxes": [["cat", float("nan"), 2, 5, 4]]}, "boxes[0] has no area"),
    ({"boxes": [["cat", "1", "2", "3", "4"]]}, "boxes[0] must be a string and four numbers"),
    ({"boxes": ["abcde"]}, "boxes[0] must be a string and four numbers"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_ROWS, ids=[reason for _, reason in BAD_ROWS])
def test_a_bad_row_says_why_in_one_line(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        from_json({**ROW, **change})
    assert str(caught.value) == reason


def test_an_unknown_role_is_refused_with_those_there_are() -> None:
    with pytest.raises(RecordError, match="'hero' is not one of subject, style"):
        from_json({"instruction": "[ref#1]", "target": "a.png", "references": [{"marker": 1, "image": "a.png", "role": "hero"}]})


def test_a_row_must_be_an_object() -> None:
    with pytest.raises(RecordError, match="a row is an object, not list"):
        from_json([ROW])  # type: ignore[arg-type]


def test_a_picture_in_memory_does_not_go_to_json() -> None:
    with pytest.raises(RecordError, match="no path"):
        Record("draw", target=PILImage.new("RGB", (2, 2))).to_json()


def test_segments_are_in_reading_order_and_by_slot() -> None:
    prompt = MultimodalPrompt("[ref#7] above [ref#2], again [ref#7]", (Reference(2, "a.png"), Reference(7, "b.png")))
    assert prompt.segments() == [Segment("", 1), Segment(" above ", None), Segment("", 0), Segment(", again ", None), Segment("", 1)]


@pytest.mark.parametrize("text", ["", "plain", "[ref#1]", "[ref#1][ref#2]", " a [ref#2] b [ref#1]  ", "[ref#] [ref#x] [ref#1"])
def test_segments_put_together_are_the_instruction(text: str) -> None:
    pieces = [f"[ref#{s.reference + 1}]" if s.reference is not None else s.text for s in split(text, [1, 2])]
    assert "".join(pieces) == text and all(pieces)


def test_a_marker_without_its_reference_is_text() -> None:
    assert split("a [ref#1] cat [ref#3]", [3]) == [Segment("a [ref#1] cat ", None), Segment("", 0)]
    assert split("[ref#1]", []) == [Segment("[ref#1]", None)]

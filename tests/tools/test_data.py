from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from lightning_mmgen.data.sources import ToyboxSource, write_jsonl
from lightning_mmgen.prompt import Box, Record
from lightning_mmgen.tools.data import check, preview
from lightning_mmgen.toybox.tasks import TASKS, edit_session

SOURCE = ToyboxSource(dict.fromkeys(TASKS, 1.0), length=12)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_jsonl(SOURCE, tmp_path)


def damage(file: Path, changes: dict[int, dict[str, Any] | str]) -> None:
    """Change the rows given by their number (from 1): some of its fields, or the whole line."""
    lines = file.read_text().splitlines()
    for row, change in changes.items():
        lines[row - 1] = change if isinstance(change, str) else json.dumps({**json.loads(lines[row - 1]), **change})
    file.write_text("\n".join(lines) + "\n")


def test_check_of_a_good_file_prints_a_summary_alone(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(str(file)) == 0
    out = capsys.readouterr().out
    counts = {r.task: sum(s.task == r.task for s in SOURCE) for r in SOURCE}
    references = [len(r.references) for r in SOURCE]
    assert out.startswith(f"{file}: 12 rows, 12 good, 0 bad; tasks: ") and out.count("\n") == 1
    assert all(f"{task} {count}" in out for task, count in counts.items())
    assert f"; references per record: {min(references)} to {max(references)}, mean {sum(references) / 12:.1f}; pictures: " in out
    assert out.endswith(" to 64 x 64\n")


def test_check_names_every_bad_row_and_goes_on(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PILImage.new("RGB", (32, 32)).save(file.parent / "small.png")
    PILImage.new("1", (9000, 9000)).save(file.parent / "bomb.png")
    (file.parent / "text.png").write_text("text")
    whole = {"instruction": "draw [ref#1]", "references": [{"marker": 1, "image": "small.png"}], "target": "small.png"}
    question = {"question": "what?", "answer": "a cat"}
    rows: dict[int, tuple[dict[str, Any] | str, str]] = {
        1: ("{", "not JSON"),
        2: (json.dumps({**whole, "instruction": "draw"}), "reference 1 has no marker [ref#1] in the instruction"),
        3: (json.dumps({**whole, "references": [{"marker": 1, "image": "text.png"}]}), "[ref#1]: text.png: not a picture"),
        4: (json.dumps({**whole, "target": "gone.png"}), "target: gone.png: no such file"),
        5: (json.dumps({**whole, "target": "../x.png"}), "target: ../x.png: leaves the data folder"),
        6: (json.dumps({**whole, "target": "bomb.png"}), "target: bomb.png: over 64000000 pixels"),
        7: (json.dumps({**whole, "mask": "pictures/mask.png"}), "the mask has 64 x 64 pixels, the target 32 x 32"),
        8: (json.dumps({**whole, "boxes": [["cat", 0, 0, 33, 5]]}), "the box of 'cat' leaves the target of 32 x 32 pixels"),
        9: (json.dumps({**whole, "boxes": [["cat", -1, 0, 3, 5]]}), "the box of 'cat' leaves the target of 32 x 32 pixels"),
        10: (json.dumps(question), "the question has no picture"),
        12: (
            json.dumps({**question, "question": "what is [ref#1]?", "references": whole["references"], "mask": "small.png"}),
            "a mask, a box or a control picture needs a target",
        ),
    }
    PILImage.new("L", (64, 64)).save(file.parent / "pictures" / "mask.png")
    damage(file, {row: change for row, (change, _) in rows.items()})
    assert check(str(file)) == 1
    *bad, summary = capsys.readouterr().out.splitlines()
    assert len(bad) == len(rows)
    for line, (row, (_, reason)) in zip(bad, rows.items(), strict=True):
        assert line.startswith(f"{file}:{row}: {reason}")
    assert summary.startswith(f"{file}: 12 rows, 1 good, 11 bad; tasks: ")


def test_check_finds_gaps_in_the_turns_of_a_session(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = edit_session(np.random.default_rng(0), False, 4)
    again = [replace(r, session="again") for r in (whole[1], whole[0], whole[1])]
    file = write_jsonl([*(whole[k] for k in (3, 0, 1)), *again], tmp_path)
    assert check(str(file)) == 1
    first, second, summary = capsys.readouterr().out.splitlines()
    assert first == f"{file}:1: turn 3 of session {whole[0].session!r} has no turn 2 before it"
    assert second == f"{file}:6: turn 1 of session 'again' comes twice" and "6 good, 0 bad" in summary
    assert check(str(write_jsonl(whole[::-1], tmp_path / "whole"))) == 0


def test_check_of_a_file_without_a_good_row(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("{\n")
    assert check(str(file)) == 1
    assert capsys.readouterr().out.splitlines()[1] == f"{file}: 1 rows, 0 good, 1 bad"


def colours(page: Path) -> set[Any]:
    with PILImage.open(page) as image:
        return {colour for _, colour in image.getcolors(1 << 24) or ()}


def test_preview_is_a_page_with_a_strip_for_each_record(file: Path) -> None:
    heights = []
    for count in (1, 5, 99):
        page = preview(str(file), file.parent / "sub" / "page.png", count=count)
        with PILImage.open(page) as image:
            assert image.format == "PNG" and image.mode == "RGB" and image.width == 1200
            heights.append(image.height)
    assert heights[0] >= 200 and 4 * heights[0] < heights[1] < heights[2]


def test_preview_shows_rows_from_all_over_the_file_where_asked(tmp_path: Path) -> None:
    source, greens = ToyboxSource({"caption": 1.0}), [(0, 10 + i, 0) for i in range(9)]
    records = [replace(source.record(i), target=PILImage.new("RGB", (8, 8), green), boxes=()) for i, green in enumerate(greens)]
    file = write_jsonl(records, tmp_path)
    for spread, shown in ((False, {0, 1, 2}), (True, {0, 4, 8})):
        seen = colours(preview(str(file), tmp_path / "page.png", target_size=8, count=3, spread=spread))
        assert {i for i, green in enumerate(greens) if green in seen} == shown


def test_preview_shows_the_pictures_as_the_model_gets_them(tmp_path: Path) -> None:
    """A wide blue reference gets black bars, a wide green target loses its red sides."""
    target = PILImage.new("RGB", (40, 20), (255, 0, 0))
    target.paste((0, 200, 0), (10, 0, 30, 20))
    record = replace(ToyboxSource({"style": 1.0}).record(0), target=target, boxes=())
    record = replace(record, references=(replace(record.references[0], image=PILImage.new("RGB", (20, 10), (0, 0, 200))),))
    seen = colours(preview(str(write_jsonl([record], tmp_path)), tmp_path / "page.png", target_size=20))
    assert {(0, 0, 200), (0, 0, 0), (0, 200, 0)} <= seen and (255, 0, 0) not in seen


def test_preview_shows_a_bad_row_as_its_error_in_red(file: Path) -> None:
    red = (0xC0, 0, 0)
    good = preview(str(file), file.parent / "good.png")
    damage(file, {2: "{", 3: {"instruction": "word " * 3000}, 4: {"target": "gone.png"}})  # row 3 is over max_tokens
    bad = preview(str(file), file.parent / "bad.png")
    assert red not in colours(good) and red in colours(bad)
    with PILImage.open(good) as a, PILImage.open(bad) as b:
        assert b.height < a.height


def test_preview_checks_its_arguments(file: Path) -> None:
    with pytest.raises(ValueError, match="count must be 1 or more"):
        preview(str(file), file.parent / "page.png", count=0)
    with pytest.raises(FileNotFoundError, match="no such file"):
        preview(str(file.parent / "gone.jsonl"), file.parent / "page.png")
    with pytest.raises(FileNotFoundError, match="toybox/gone is not an embedded part"):
        preview(str(file), file.parent / "page.png", encoder="toybox/gone")


def test_preview_shows_crops_where_asked(tmp_path: Path) -> None:
    target = PILImage.new("RGB", (40, 20), (255, 0, 0))
    target.paste((0, 200, 0), (0, 0, 8, 8))  # outside the square that is the target, inside the box
    record = Record("a cat", target=target, caption="a cat", boxes=(Box("cat", 0, 0, 8, 8),))
    path = write_jsonl([record] * 8, tmp_path)
    plain, crops = (preview(str(path), tmp_path / f"{c}.png", target_size=20, crops=c) for c in (False, True))
    green = (0, 200, 0)
    assert green not in colours(plain) and green in colours(crops)

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from lightning_mmgen.data.instructions import InstructionDataModule
from lightning_mmgen.data.order import Position, RecordDataset
from lightning_mmgen.data.recipe import Sample
from lightning_mmgen.data.sources import JSONLSource
from lightning_mmgen.tools.data import check
from lightning_mmgen.tools.main import main

CLASSES = "subject_name,class\ncat2,cat\nmug,blue mug\nlamp,lamp\n\nprompt_list = [\n'a {0} {1}'.format(unique_token, class_token),\n"


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Four pictures of a cat, one of them in a folder of its own, two of a mug, one of a lamp, and one of nothing; a list of classes."""
    for i, name in enumerate(
        ["cat2/a.png", "cat2/b.png", "cat2/c.png", "cat2/more/d.png", "mug/0.png", "mug/1.png", "lamp/0.png", "x.png"]
    ):
        (path := tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (8, 8), (30 * i,) * 3).save(path)
    (tmp_path / "classes.txt").write_text(CLASSES)
    return [*["build", "subjects", "--images"], f"{tmp_path}/in", "--classes", f"{tmp_path}/classes.txt", "--out", f"{tmp_path}/out"]


def grey(picture: object, out: Path) -> int:
    with PILImage.open(out / str(picture)) as image:
        return int(np.asarray(image)[0, 0, 0]) // 30


def built(out: Path) -> dict[int, tuple[str, list[int]]]:
    """By the number of its target, the instruction of each record and the numbers of its references."""
    return {
        grey(r.target, out): (r.instruction, [grey(x.image, out) for x in r.references]) for r in JSONLSource(str(out / "records.jsonl"))
    }


def test_every_picture_is_shown_by_others_of_its_subject(arguments: list[str], tmp_path: Path) -> None:
    assert main([*arguments, "--references", "2"]) == 0
    found = built(tmp_path / "out")
    assert {target: shown for target, (_, shown) in found.items()} == {0: [1, 2], 1: [2, 3], 2: [3, 0], 3: [0, 1], 4: [5], 5: [4]}
    assert found[0][0] == "Generate an image of [ref#1] [ref#2] cat, using the caption: a cat"
    assert found[4][0] == "Generate an image of [ref#1] blue mug, using the caption: a blue mug"
    told = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert told == {"pictures": 7, "subjects": 2, "records": 6, "subjects under --min-size": 1}
    assert check(str(tmp_path / "out" / "records.jsonl")) == 0


def test_captions_and_readable_pictures_decide_what_stays(arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in" / "cat2" / "b.png").write_text("no picture")
    rows = [{"image": f"cat2/{name}", "caption": f"a cat  {name[0]}"} for name in ("a.png", "b.png", "more/d.png")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*arguments, "--captions", f"{tmp_path}/rows.jsonl"]) == 0
    assert built(tmp_path / "out") == {
        0: ("Generate an image of [ref#1] cat, using the caption: a cat a", [3]),
        3: ("Generate an image of [ref#1] cat, using the caption: a cat m", [0]),
    }
    told = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert (told["pictures"], told["unreadable"], told["no caption"], told["subjects under --min-size"]) == (2, 1, 4, 2)
    assert "b.png" in capfd.readouterr().err


def test_records_are_what_instruction_tuning_calls_subjects(arguments: list[str], tmp_path: Path) -> None:
    assert main(arguments) == 0
    source = str(tmp_path / "out" / "records.jsonl")
    data = InstructionDataModule({"subjects": source}, {"subjects": 1.0}, source, reference_size=16, target_size=16)
    data.setup("fit")
    items = [RecordDataset(data.train, data.recipe, 0)[Position(i, 0)] for i in range(6)]
    for records in ([item.record for item in items if isinstance(item, Sample)], data.held_out_records(6)):
        assert len(records) == 6 and {r.caption for r in records} == {"a cat", "a blue mug"}
        for record in records:
            words = "[ref#1] [ref#2] [ref#3] cat" if record.caption == "a cat" else "[ref#1] blue mug"
            assert words in record.instruction and str(record.caption) in record.instruction.replace(words, "")
        assert len({r.instruction for r in records}) > 2  # templates are drawn anew


def test_shards_equal_one_run_and_folders_name_subjects_without_classes(arguments: list[str], tmp_path: Path) -> None:
    arguments = [a for a in arguments if not a.endswith("classes.txt") and a != "--classes"]
    assert main(arguments) == 0 and built(tmp_path / "out")[4][0].startswith("Generate an image of [ref#1] mug, using")
    for shard in ("1/2", "0/2"):
        assert main([*arguments, "--out", f"{tmp_path}/shards", "--shard", shard]) == 0
    assert sorted((tmp_path / "shards" / "records.jsonl").read_text().splitlines()) == sorted(
        (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    )


def test_what_a_user_can_mend_is_one_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "few.txt").write_text("cat2,cat\nmug,\n")
    (tmp_path / "flat").mkdir()
    PILImage.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    for changes, message in (
        (["--images", f"{tmp_path}/gone"], "gone: no such folder"),
        (["--images", f"{tmp_path}/flat"], "flat: holds no folder of a subject"),
        (["--classes", f"{tmp_path}/gone.txt"], "gone.txt: no such file"),
        (["--classes", f"{tmp_path}/few.txt"], "few.txt: has no class for the folder 'lamp'"),
        (["--references", "0"], "--references must be 1 or more"),
        (["--out", f"{tmp_path}/in/out"], "where it would be taken for more pictures"),
    ):
        assert main([*arguments, *changes]) == 1
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1

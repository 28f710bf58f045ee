from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image as PILImage
from PIL.Image import Image

from lightning_mmgen.data.images import open_picture
from lightning_mmgen.data.sources import JSONLSource
from lightning_mmgen.prompt import Record
from lightning_mmgen.tools.data import check
from lightning_mmgen.tools.main import main

from .conftest import contents, interrupt

Row = dict[str, Any]
PIX2PIX = {
    "original_image": "picture",
    "edit_prompt": "text",
    "edited_image": "picture",
    "original_prompt": "text",
    "edited_prompt": "text",
}
MAGICBRUSH = {"img_id": "text", "turn_index": "int", "source_img": "picture", "mask_img": "picture", "instruction": "text"}
MAGICBRUSH |= {"target_img": "picture"}
KINDS = {"picture": datasets.Image(), "text": datasets.Value("string"), "int": datasets.Value("int32")}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ``datasets`` library keeps its copies in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def noise(seed: int, width: int = 12, height: int = 12) -> Image:
    """Without white."""
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 200, (height, width, 3), dtype=np.uint8))


def encoded(image: Image, form: str = "PNG") -> bytes:
    image.save(file := io.BytesIO(), form)
    return file.getvalue()


def cut(image: Image, box: tuple[int, int, int, int], alpha: bool = True) -> Image:
    """The picture with a region cut out, transparent or white."""
    image = image.convert("RGBA" if alpha else "RGB")
    image.paste((255, 255, 255, 0) if alpha else (255, 255, 255), box)
    return image


def table(rows: list[Row], kinds: dict[str, str]) -> Any:
    return datasets.Dataset.from_list(rows, features=datasets.Features({name: KINDS[kind] for name, kind in kinds.items()}))


def save(rows: list[Row], kinds: dict[str, str], folder: Path, split: str = "train") -> str:
    """Two parquet files, named as the hub names them."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for part in (0, 1):
        table(rows[part::2], kinds).to_parquet(folder / "data" / f"{split}-0000{part}-of-00002.parquet")
    return str(folder)


def pix2pix(number: int, **changes: Any) -> Row:
    """A row; the source a JPEG, the target a PNG."""
    row = {
        "original_image": encoded(noise(number), "JPEG"),
        "edit_prompt": f"make it {number}",
        "edited_image": encoded(noise(100 + number)),
    }
    return {**row, "original_prompt": f"a cat {number}", "edited_prompt": f"a dog {number}", **changes}


def brush(session: str, turn: int, **changes: Any) -> Row:
    """A turn; its target is the next one's source."""
    seed = sum(session.encode()) * 10 + turn
    row = {"img_id": session, "turn_index": turn, "source_img": encoded(noise(seed)), "target_img": encoded(noise(seed + 1))}
    mask = encoded(cut(noise(seed), (turn, 2, turn + 4, 5)))
    return {**row, "mask_img": mask, "instruction": f"change {session} {turn}", **changes}


def build(data: str | Path, out: Path, *options: str) -> list[Record]:
    """The records of a build that succeeds, checked."""
    assert main(["build", "edits", "--data", str(data), "--out", str(out), *options]) == 0
    records = out / "records.jsonl"
    if not records.stat().st_size:
        return []
    assert check(str(records)) == 0
    return list(JSONLSource(str(records)))


def counts(out: Path) -> dict[str, int]:
    return dict(json.loads((out / "counts.json").read_text()))


def grey(record: Record, out: Path) -> npt.NDArray[np.uint8]:
    with PILImage.open(out / str(record.mask)) as image:
        assert image.mode == "L"
        return np.array(image)


def test_instructpix2pix_is_read_from_parquet_without_a_copy_and_keeps_its_bytes(tmp_path: Path) -> None:
    rows = [pix2pix(i) for i in range(5)]
    out = tmp_path / "out"
    records = build(save(rows, PIX2PIX, tmp_path / "in"), out)
    for record, row in zip(records, rows[::2] + rows[1::2], strict=True):
        (source,) = record.references
        assert record.instruction == f"In the [ref#1] picture, {row['edit_prompt']}"
        assert (source.marker, source.phrase, source.role, record.task, record.mask) == (1, "picture", "source", "edit", None)
        assert (record.caption, record.source_caption) == (row["edited_prompt"], row["original_prompt"])
        assert str(source.image).endswith(".jpg") and (out / str(source.image)).read_bytes() == row["original_image"]
        assert str(record.target).endswith(".png") and (out / str(record.target)).read_bytes() == row["edited_image"]
    assert counts(out) == {"rows": 5, "kept": 5} and not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_saved_data_set_and_a_parquet_file_give_the_same_records(tmp_path: Path) -> None:
    rows = [pix2pix(i) for i in range(3)]
    table(rows, PIX2PIX).save_to_disk(tmp_path / "a")
    datasets.DatasetDict({"dev": table(rows, PIX2PIX)}).save_to_disk(tmp_path / "b")
    table(rows, PIX2PIX).to_parquet(tmp_path / "c.parquet")
    a = build(tmp_path / "a", tmp_path / "1")
    assert len(a) == 3 and a == build(tmp_path / "b", tmp_path / "2", "--split", "dev") == build(tmp_path / "c.parquet", tmp_path / "3")


def test_sessions_of_three_turns_are_put_in_order(tmp_path: Path) -> None:
    rows = [brush(session, turn) for session in "abcd" for turn in (1, 2, 3)]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    out = tmp_path / "out"
    records = build(save(shuffled, MAGICBRUSH, tmp_path / "in"), out)
    for place, record in enumerate(records):
        assert record.turn == place % 3
        row = brush(str(record.session), record.turn + 1)
        assert record.instruction == f"In the [ref#1] picture, {row['instruction']}" and record.id == f"{record.session}-{record.turn}"
        assert (out / str(record.references[0].image)).read_bytes() == row["source_img"]
        if record.turn:
            before = records[place - 1]
            assert before.session == record.session
            assert (out / str(before.target)).read_bytes() == (out / str(record.references[0].image)).read_bytes()
        expected = np.zeros((12, 12), np.uint8)
        expected[2:5, record.turn + 1 : record.turn + 5] = 255
        np.testing.assert_array_equal(grey(record, out), expected)
    assert sorted({str(record.session) for record in records}) == list("abcd") and len(records) == 12
    again = build(save(rows, MAGICBRUSH, tmp_path / "sorted"), tmp_path / "again")
    assert {r.id: r.instruction for r in again} == {r.id: r.instruction for r in records}


def test_a_session_is_kept_up_to_its_gap(tmp_path: Path) -> None:
    turns = {"a": [1, 2, 4], "b": [3, 2], "c": [1, 2, 2, 3], "d": [1, 2, 3, 4], "e": [1]}
    rows = [brush(session, turn) for session, places in turns.items() for turn in places]
    next(row for row in rows if row["img_id"] == "d" and row["turn_index"] == 3)["instruction"] = ""
    records = build(save(rows, MAGICBRUSH, tmp_path / "in"), tmp_path / "out")
    kept = {s: [r.turn for r in records if r.session == s] for s in turns}
    assert kept == {"a": [0, 1], "b": [], "c": [0, 1], "d": [0, 1], "e": [0]}
    assert counts(tmp_path / "out") == {"rows": 14, "kept": 7, "turn gap": 6, "instruction empty": 1}


def test_white_of_the_mask_is_told_from_white_of_the_source(tmp_path: Path) -> None:
    source = noise(0, 20, 16)
    source.paste("white", (8, 6, 11, 9))  # inside the region
    source.paste("white", (14, 10, 18, 14))  # away from it
    row = brush(
        "a", 1, source_img=encoded(source), target_img=encoded(noise(1, 20, 16)), mask_img=encoded(cut(source, (5, 3, 13, 12), False))
    )
    (record,) = build(save([row, row], MAGICBRUSH, tmp_path / "in"), tmp_path / "out")[:1]
    expected = np.zeros((16, 20), np.uint8)
    expected[3:12, 5:13] = 255
    np.testing.assert_array_equal(grey(record, tmp_path / "out"), expected)


def test_masks_of_another_size_are_resized_where_the_aspect_agrees_and_full_ones_counted(tmp_path: Path) -> None:
    small = cut(noise(0, 6, 6), (0, 0, 3, 6))
    rows = [
        brush("a", 1, mask_img=encoded(small)),
        brush("b", 1, mask_img=encoded(cut(noise(1), (0, 0, 12, 12)))),
        brush("c", 1, mask_img=None),
    ]
    records = {str(r.session): r for r in build(save(rows, MAGICBRUSH, tmp_path / "in"), tmp_path / "out")}
    half = np.zeros((12, 12), np.uint8)
    half[:, :6] = 255
    np.testing.assert_array_equal(grey(records["a"], tmp_path / "out"), half)
    assert grey(records["b"], tmp_path / "out").min() == 255 and records["c"].mask is None
    assert counts(tmp_path / "out") == {"rows": 3, "kept": 3, "masks resized": 1, "masks full": 1}


def test_every_rule_drops_its_row_and_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad: dict[str, Row] = {
        "source unreadable": {"source_img": b"no picture"},
        "target unreadable": {"target_img": encoded(noise(0))[:90]},
        "instruction empty": {"instruction": " [ref#2] "},
        "instruction without source": {"source_img": None},
        "source and target over --max-aspect": {"target_img": encoded(noise(0, 16, 12))},
        "mask unreadable": {"mask_img": b"\x89PNG"},
        "mask of another aspect": {"mask_img": encoded(cut(noise(0, 16, 12), (0, 0, 4, 4)))},
        "mask empty": {"mask_img": encoded(noise(0))},
        "bad row": {"turn_index": None},
        "turn gap": {"turn_index": 2},
    }
    rows = [brush(f"s{i}", 1, **changes) for i, changes in enumerate(bad.values())]
    rows += [brush("marked", 1, instruction="[ref#[ref#1]2] red"), brush("none", 1, img_id=None)]
    records = build(save([*rows, brush("good", 1)], MAGICBRUSH, tmp_path / "in"), tmp_path / "out")
    assert [record.session for record in records] == ["good"]
    assert counts(tmp_path / "out") == {"rows": len(rows) + 1, "kept": 1, **dict.fromkeys(bad, 1), "bad row": 3}
    told = capsys.readouterr()
    assert "source unreadable: picture: not a picture of a known format" in told.err and "mask empty" in told.out


def test_aspects_are_compared_to_the_option(tmp_path: Path) -> None:
    rows = [pix2pix(i, edited_image=encoded(noise(i, 100, side))) for i, side in enumerate((100, 99, 97, 110))]
    data = save([row | {"original_image": encoded(noise(9, 50, 50))} for row in rows], PIX2PIX, tmp_path / "in")
    for most, kept in (("1", 1), ("1.02", 2), ("1.05", 3), ("1.11", 4)):
        assert len(build(data, tmp_path / most, "--max-aspect", most)) == kept


def omnigen(folder: Path, rows: list[Row | str]) -> Path:
    (folder / "images").mkdir(parents=True)
    for i in range(3):
        noise(i).save(folder / "images" / f"{i}.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "toy.jsonl").write_text("\n".join(lines))
    return folder / "toy.jsonl"


def lines(instruction: Any, pictures: Any, target: Any = "2.png") -> Row:
    return {"task_type": "image_edit", "instruction": instruction, "input_images": pictures, "output_image": target}


def test_placeholders_of_omnigen_become_markers(tmp_path: Path) -> None:
    one, two = "<img><|image_1|></img>", "<img><|image_2|></img>"
    rows: list[Row | str] = [
        lines(f"{one} The umbrella\nshould be red.", ["0.png"]),
        lines(f"{two} wears {one}, as {two}.", ["0.png", "1.png"]),
    ]
    out = tmp_path / "out"
    edit, wear = build(omnigen(tmp_path / "in", rows), out, "--images", str(tmp_path / "in" / "images"))
    assert edit.instruction == "[ref#1] The umbrella should be red." and edit.task == "edit"
    assert [(r.marker, r.phrase, r.role) for r in edit.references] == [(1, "picture", "source")]
    assert wear.instruction == "[ref#2] wears [ref#1], as [ref#2]." and wear.task == "subject"
    assert [(r.marker, r.role) for r in wear.references] == [(1, "subject"), (2, "subject")]
    for k, reference in enumerate(wear.references):
        assert (out / str(reference.image)).read_bytes() == (tmp_path / "in" / "images" / f"{k}.png").read_bytes()
    assert np.array_equal(np.array(open_picture(wear.target or "", out)), np.array(noise(2)))


def test_keys_of_omnigen_may_have_other_names(tmp_path: Path) -> None:
    row = {"instruction": "<img><|image_1|></img> red", "input_images": ["images/0.png"], "output_images": "images/1.png"}
    (record,) = build(omnigen(tmp_path / "in", [row]), tmp_path / "out", "--target-column", "output_images")
    assert (tmp_path / "out" / str(record.target)).read_bytes() == (tmp_path / "in" / "images" / "1.png").read_bytes()


def test_rows_of_omnigen_whose_placeholders_and_pictures_disagree_are_dropped(tmp_path: Path) -> None:
    one = "<img><|image_1|></img>"
    bad: list[Row | str] = [
        lines("a cat", ["0.png"]),
        lines(f"{one} red", []),
        lines(f"{one} red", ["0.png", "1.png"]),
        lines("<img><|image_2|></img> red", ["0.png"]),
        lines("a white cat", []),
        lines(one, ["0.png"]),
        lines(f"{one} red", ["gone.png"]),
        lines(f"{one} red", ["../toy.jsonl"]),
        lines(f"{one} red", ["0.png"], "gone.png"),
        lines(7, ["0.png"]),
        lines(f"{one} red", [7]),
        {"instruction": "x"},
        "{",
        "[]",
    ]
    data = omnigen(tmp_path / "in", [*bad, lines(f"[ref#3] {one} red \ud800", ["0.png"])])
    (record,) = build(data, tmp_path / "out", "--images", str(tmp_path / "in" / "images"))
    assert record.instruction == "[ref#1] red ?" and record.id == "00000014"
    expected = {"placeholders and pictures disagree": 4, "instruction without source": 1, "instruction empty": 1}
    expected |= {"source unreadable": 2, "target unreadable": 1, "bad row": 5}
    assert counts(tmp_path / "out") == {"rows": 15, "kept": 1, **expected}


def test_examples_of_step1x_are_a_file_of_instructions_beside_its_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("0000_source", "0000_target", "0003_source"):
        noise(len(name)).save(folder / f"{name}.jpg")
    (folder / "prompt_en.json").write_text(json.dumps({"0000.jpg": "Add a pendant.", "0003.png": "Change it.", "0004.png": "Change."}))
    (record,) = build(folder, tmp_path / "out")
    assert record.instruction == "In the [ref#1] picture, Add a pendant." and record.references[0].role == "source"
    assert (tmp_path / "out" / str(record.target)).read_bytes() == (folder / "0000_target.jpg").read_bytes()
    assert counts(tmp_path / "out") == {"rows": 3, "kept": 1, "target unreadable": 1, "instruction without source": 1}
    assert build(folder / "prompt_en.json", tmp_path / "again") == [record]
    shutil.copy(folder / "prompt_en.json", tmp_path / "alone.json")
    assert build(tmp_path / "alone.json", tmp_path / "elsewhere", "--images", str(folder)) == [record]


def test_columns_may_have_other_names_or_none(tmp_path: Path) -> None:
    rows = [brush("a", 1), brush("a", 3)]
    names = {"img_id": "id", "turn_index": "n", "source_img": "x", "mask_img": "m", "instruction": "say", "target_img": "y"}
    renamed = [{names[key]: value for key, value in row.items()} for row in rows]
    data = save(renamed, {names[key]: kind for key, kind in MAGICBRUSH.items()}, tmp_path / "in")
    options = ["source=x", "target=y", "instruction=say", "mask=m", "session=id", "turn=n", "caption=say", "source-caption=id"]
    words = [word for name, value in (o.split("=") for o in options) for word in (f"--{name}-column", value)]
    (record,) = build(data, tmp_path / "out", "--format", "magicbrush", *words)
    assert record.session == "a" and record.mask and (record.caption, record.source_caption) == ("change a 1", "a")
    single = build(
        data, tmp_path / "single", "--format", "magicbrush", *words, "--session-column", "", "--turn-column", "", "--mask-column", ""
    )
    assert [(r.session, r.turn, r.mask) for r in single] == [(None, None, None)] * 2


def test_paths_in_a_column_are_relative_to_the_pictures_and_may_not_leave_them(tmp_path: Path) -> None:
    kinds = {**PIX2PIX, "original_image": "text"}
    data = save([pix2pix(i, original_image=name) for i, name in enumerate(("a.png", "../b.png"))], kinds, tmp_path / "in")
    (tmp_path / "pictures").mkdir()
    noise(0).save(tmp_path / "pictures" / "a.png")
    noise(0).save(tmp_path / "b.png")
    (record,) = build(data, tmp_path / "out", "--images", str(tmp_path / "pictures"))
    assert record.caption == "a dog 0" and counts(tmp_path / "out")["source unreadable"] == 1


def streamed(folder: Path) -> str:
    return save([pix2pix(i, **({"edited_image": None} if i % 4 == 3 else {})) for i in range(12)], PIX2PIX, folder)


def in_sessions(folder: Path) -> str:
    return save([brush(f"s{i % 6}", i // 6 + 1) for i in range(18)], MAGICBRUSH, folder)


@pytest.mark.parametrize("make", [streamed, in_sessions])
def test_a_stopped_build_and_shards_equal_one_run(make: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(tmp_path / "in")
    records = build(data, tmp_path / "out")
    interrupt(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        build(data, tmp_path / "stopped")
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with (tmp_path / "stopped" / "journal.jsonl").open("a") as file:
        file.write('{"key": "torn')
    assert build(data, tmp_path / "stopped") == records
    assert (tmp_path / "stopped" / "records.jsonl").read_bytes() == (tmp_path / "out" / "records.jsonl").read_bytes()
    for shard in ("1/2", "0/2"):
        assert main(["build", "edits", "--data", data, "--out", str(tmp_path / "shards"), "--shard", shard]) == 0
    whole, stopped, shards = (contents(tmp_path / name, "images/**/*.*") for name in ("out", "stopped", "shards"))
    assert whole == stopped == shards and len(whole[0]) == (9 if make is streamed else 18)
    assert counts(tmp_path / "out") == counts(tmp_path / "stopped") == counts(tmp_path / "shards")


def test_what_a_user_can_mend_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = save([pix2pix(0), pix2pix(1)], PIX2PIX, tmp_path / "in")
    other = save([{"a": "x"}] * 2, {"a": "text"}, tmp_path / "other")
    datasets.DatasetDict({"dev": table([pix2pix(0)], PIX2PIX)}).save_to_disk(tmp_path / "saved")
    (tmp_path / "bad.json").write_text('["x"]')
    (tmp_path / "bad.parquet").write_text("x")
    (tmp_path / "none.jsonl").touch()
    for arguments, message in (
        ([str(tmp_path / "gone")], "gone: no such file or folder"),
        ([str(tmp_path / "gone.jsonl")], "gone.jsonl: no such file or folder"),
        ([data, "--images", str(tmp_path / "gone")], "gone: no such folder"),
        ([data, "--max-aspect", "0.9"], "--max-aspect 0.9 must be 1 or more"),
        ([data, "--split", "dev"], "Bad split: dev"),
        ([str(tmp_path / "saved")], "no split 'train'; there are dev"),
        ([data, "--source-column", "before"], "has no column 'before' (--source-column); there are original_image"),
        ([data, "--format", "magicbrush"], "has no column 'source_img'"),
        ([data, "--session-column", "edit_prompt"], "session and turn go together"),
        ([other], "--format cannot be guessed from the columns a; give one of instructpix2pix, magicbrush"),
        ([str(tmp_path / "bad.json")], "bad.json: is not an object of instructions by picture"),
        ([str(tmp_path / "bad.parquet")], "Parquet"),
        ([str(tmp_path / "none.jsonl")], "none.jsonl: holds no rows"),
        ([data, "--format", "step1x"], "holds 0 files prompt*.json, not one"),
        ([str(tmp_path / "bad.json"), "--source-column", "x"], "--source-column: the format step1x has none"),
        ([str(tmp_path / "none.jsonl"), "--mask-column", "x"], "--mask-column: the format omnigen has none"),
        ([data, "--shard", "2/2"], "i counts from 0"),
    ):
        assert main(["build", "edits", "--out", str(tmp_path / "new"), "--data", *arguments]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error
    assert main(["build", "edits", "--data", data, "--out", f"{data}/out"]) == 1
    assert "where it would be taken for data" in capsys.readouterr().err
    build(data, tmp_path / "new")
    shutil.copy(tmp_path / "in" / "data" / "train-00000-of-00002.parquet", tmp_path / "in" / "data" / "train-00002-of-00002.parquet")
    assert main(["build", "edits", "--data", data, "--out", str(tmp_path / "new")]) == 1
    assert "was begun with other settings (digest)" in capsys.readouterr().err

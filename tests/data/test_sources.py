from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image as PILImage

from lightning_mmgen.data.images import open_picture
from lightning_mmgen.data.sources import DatasetSource, JSONLSource, RowError, Source, ToyboxSource, open_source, write_jsonl
from lightning_mmgen.prompt import Picture, Record, RecordError, Reference
from lightning_mmgen.toybox.tasks import TASKS, edit_session

ALL = dict.fromkeys(TASKS, 1.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ``datasets`` library keeps its copies in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def array(picture: Picture | None, root: Path | None = None) -> np.ndarray[Any, Any]:
    assert picture is not None
    return np.array(open_picture(picture, root))


def assert_same(a: Record, b: Record, root: Path | None) -> None:
    """Equal fields, and equal pictures of ``a`` (in memory) and ``b`` (from ``root``)."""
    bare = {"references": (), "instruction": "draw", "target": "t.png", "mask": None}
    assert replace(a, **bare) == replace(b, **bare)  # type: ignore[arg-type]
    assert a.instruction == b.instruction and (a.mask is None) == (b.mask is None) and (a.target is None) == (b.target is None)
    if a.target is not None:
        assert np.array_equal(array(a.target), array(b.target, root))
    if a.mask is not None:
        assert np.array_equal(array(a.mask), array(b.mask, root))
    for r, s in zip(a.references, b.references, strict=True):
        assert (r.marker, r.phrase, r.role) == (s.marker, s.phrase, s.role)
        assert np.array_equal(array(r.image), array(s.image, root))


def toys(count: int = 8) -> list[Record]:
    source = ToyboxSource({k: v for k, v in ALL.items() if k not in ("question", "naming", "measuring")}, length=count)
    return list(source)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (4, 4), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


# -- JSONL -----------------------------------------------------------------------------------------------------------------------


def test_records_written_as_jsonl_come_back(tmp_path: Path) -> None:
    records = [*ToyboxSource(ALL, length=24), *edit_session(np.random.default_rng(0), False, 3)]
    path = write_jsonl(records, tmp_path / "out")
    source = open_source(str(path))
    assert isinstance(source, JSONLSource) and len(source) == 27 and source.root == path.parent
    for before, after in zip(records, source, strict=True):
        assert_same(before, after, source.root)
    assert {r.task for r in records} >= {"edit", "question"}


def test_write_jsonl_keeps_paths_and_decodes_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(7))
    path = write_jsonl([Record("draw [ref#3]", (Reference(3, png(5)),), "a.png")], tmp_path)
    record = open_source(str(path)).record(0)
    assert record.target == "a.png" and record.references[0].image == "pictures/000000_ref3.png"
    assert (array(record.references[0].image, tmp_path) == 5).all()
    with pytest.raises(RecordError, match="not a picture"):
        write_jsonl([Record("draw", target=b"text")], tmp_path)


def test_a_bad_line_is_named_by_file_and_row(tmp_path: Path) -> None:
    good = json.dumps({"instruction": "ein Bär 🐻", "target": "a.png"}, ensure_ascii=False).encode()
    lines = [good, b"{not json", b'{"instruction": "draw"}', b"\xff\xfe{}", b"", b"[" * 100_000, good]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    source = JSONLSource(str(tmp_path / "rows.jsonl"))
    assert len(source) == 7
    assert source.record(0) == source.record(6) == Record("ein Bär 🐻", target="a.png")
    for row, reason in [(1, "not JSON"), (2, "target is missing"), (3, "codec can't decode"), (4, "not JSON"), (5, "recursion")]:
        with pytest.raises(RowError, match=reason) as caught:
            source.record(row)
        assert str(caught.value).startswith(f"rows.jsonl:{row + 1}: ") and "\n" not in str(caught.value)
        assert caught.value.row == row and str(caught.value).endswith(caught.value.reason)


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no rows"):
        open_source(str(tmp_path / "empty.jsonl"))
    for name in ("gone.jsonl", "gone.parquet", "gone"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            open_source(str(tmp_path / name))


def test_the_fingerprint_follows_the_rows(tmp_path: Path) -> None:
    for name, caption in (("a", "cat"), ("b", "cat"), ("c", "dog")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"instruction": caption, "target": "a.png"}) + "\n")
    a, b, c = (JSONLSource(str(tmp_path / f"{name}.jsonl")).fingerprint() for name in "abc")
    assert a == b != c


# -- parquet and datasets folders ------------------------------------------------------------------------------------------------


def as_row(record: Record) -> dict[str, Any]:
    """A record as a parquet row, its pictures as bytes."""

    def data(picture: Picture | None) -> dict[str, Any] | None:
        if picture is None:
            return None
        buffer = io.BytesIO()
        open_picture(picture).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    return {
        **{k: getattr(record, k) for k in ("instruction", "caption", "source_caption", "description", "foil")},
        **{k: getattr(record, k) for k in ("task", "session", "turn", "id")},
        "references": [{"marker": r.marker, "image": data(r.image), "phrase": r.phrase, "role": r.role} for r in record.references],
        "target": data(record.target),
        "mask": data(record.mask),
        "boxes": [b._asdict() for b in record.boxes],
    }


def table(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """Rows with picture columns, in lists too, as the ``datasets`` library types them."""
    plain = datasets.Dataset.from_list(rows)
    features = plain.features.copy()
    features["target"] = features["mask"] = datasets.Image()
    features["references"] = [{**features["references"].feature, "image": datasets.Image()}]
    return plain.cast(datasets.Features(features))


def saved(kind: str, rows: list[dict[str, Any]], folder: Path) -> Source:
    if kind == "parquet":
        table(rows).to_parquet(folder / "rows.parquet")
        return open_source(str(folder / "rows.parquet"))
    data = table(rows)
    (data if kind == "folder" else datasets.DatasetDict({"train": data})).save_to_disk(folder / "rows")
    return open_source(str(folder / "rows"))


@pytest.mark.parametrize("kind", ["parquet", "folder", "folder of splits"])
def test_records_in_a_table_come_back(kind: str, tmp_path: Path) -> None:
    records = toys()
    source = saved(kind, [as_row(r) for r in records], tmp_path)
    assert isinstance(source, DatasetSource) and len(source) == 8
    for before, after in zip(records, source, strict=True):
        assert isinstance(after.target, bytes)
        assert_same(before, after, source.root)


def test_a_bad_row_of_a_table_is_named_and_a_broken_picture_is_left_to_the_reader(tmp_path: Path) -> None:
    rows = [as_row(r) for r in toys(3)]
    rows[0]["references"] = [{"marker": 1, "image": {"bytes": b"broken", "path": None}, "phrase": "", "role": ""}]
    rows[0]["instruction"] = "[ref#1]"
    rows[1]["instruction"] = " "
    source = saved("parquet", rows, tmp_path)
    assert source.record(0).references == (Reference(1, b"broken"),)
    with pytest.raises(RowError, match=r"rows\.parquet:2: instruction is empty$"):
        source.record(1)
    assert source.record(2).instruction == rows[2]["instruction"]


def test_parquet_with_plain_bytes(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"instruction": "draw", "target": png(9)}]).to_parquet(tmp_path / "plain.parquet")
    source = open_source(str(tmp_path / "plain.parquet"))
    assert source.record(0) == Record("draw", target=png(9)) and source.root == tmp_path


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_the_fingerprint_of_a_table_follows_its_rows(kind: str, tmp_path: Path) -> None:
    prints = []
    for name, count in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        prints.append(saved(kind, [as_row(r) for r in toys(count)], tmp_path / name).fingerprint())
    path = next((tmp_path / "a").iterdir())
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    again = [open_source(str(p)).fingerprint() for p in (path, tmp_path / "copy" / path.name)]
    assert prints[0] == again[0] == again[1] != prints[1]


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": table([as_row(r) for r in toys(1)])}).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="no split 'train'; there are test"):
        open_source(str(tmp_path / "rows"))


# -- toybox ----------------------------------------------------------------------------------------------------------------------


def test_toybox_records_are_a_function_of_seed_epoch_and_row() -> None:
    a, b = ToyboxSource(ALL, seed=3), ToyboxSource(ALL, seed=3)
    for i in (5, 0, 17, 5):
        assert_same(a.record(i, 2), b.record(i, 2), None)
    others = [a.record(5, 3), a.record(6, 2), ToyboxSource(ALL, seed=4).record(5, 2)]
    assert all(other.prompt() != a.record(5, 2).prompt() for other in others)


def test_held_out_toybox_records_are_the_same_every_epoch() -> None:
    source = ToyboxSource({"caption": 1.0}, held_out=True)
    assert_same(source.record(4, 0), source.record(4, 9), None)


def test_toybox_tasks_come_in_the_shares_of_their_weights() -> None:
    source = ToyboxSource({"caption": 3.0, "naming": 1.0, "edit": 0.0}, length=200)
    counts = [sum(r.task == task for r in source) for task in ("caption", "naming", "edit")]
    assert counts[2] == 0 and sum(counts) == 200 and 125 < counts[0] < 175


def test_swapped_references_show_other_toys_to_the_same_instruction_and_target() -> None:
    for plain, swapped in zip(ToyboxSource(ALL, length=12), ToyboxSource(ALL, length=12, swap_references=True), strict=True):
        assert swapped.instruction == plain.instruction and swapped.caption == plain.caption
        assert [(r.marker, r.phrase, r.role) for r in swapped.references] == [(r.marker, r.phrase, r.role) for r in plain.references]
        if plain.target is not None:
            assert np.array_equal(array(plain.target), array(swapped.target))
        for r, s in zip(plain.references, swapped.references, strict=True):
            assert not np.array_equal(array(r.image), array(s.image))


@pytest.mark.parametrize("tasks", [{"juggle": 1.0}, {"caption": -1.0}, {"caption": 0.0}, {}])
def test_toybox_weights_are_checked(tasks: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="toybox task"):
        ToyboxSource(tasks)


def test_toybox_fingerprints_tell_sources_apart() -> None:
    settings = [(9, 0, False), (9, 1, False), (8, 0, False), (9, 0, True)]
    prints = [ToyboxSource(ALL, *values).fingerprint() for values in settings]
    assert len(set(prints)) == 4 and prints[0] == ToyboxSource(ALL, length=9).fingerprint()

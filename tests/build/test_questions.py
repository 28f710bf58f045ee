"""Published pictures with questions or captions, in the columns that they are published in, as records of questions."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest

from lightning_mmgen.data.sources import JSONLSource
from lightning_mmgen.prompt import Record
from lightning_mmgen.tools.data import check, preview
from lightning_mmgen.tools.main import main

from .conftest import interrupt
from .test_edits import encoded, noise

Row = dict[str, Any]
TEXT, TEXTS, PICTURE = datasets.Value("string"), datasets.List(datasets.Value("string")), datasets.Image()
FLICKR = {"image": PICTURE, "caption": TEXTS, "sentids": TEXTS, "split": TEXT, "img_id": TEXT, "filename": TEXT}
RLAIFV = {
    "ds_name": TEXT,
    "image": PICTURE,
    "question": TEXT,
    "chosen": TEXT,
    "rejected": TEXT,
    "origin_dataset": TEXT,
    "idx": datasets.Value("int64"),
}
OCRVQA = {
    "image": PICTURE,
    "image_id": TEXT,
    "questions": TEXTS,
    "answers": TEXTS,
    "ocr_tokens": TEXTS,
    "title": TEXT,
    "image_width": datasets.Value("int64"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ``datasets`` library keeps its copies in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def save(rows: list[Row], features: dict[str, Any], folder: Path) -> str:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    full = [{name: row.get(name) for name in features} for row in rows]
    path = folder / "data" / "train-00000-of-00001.parquet"
    datasets.Dataset.from_list(full, features=datasets.Features(features)).to_parquet(path)
    return str(folder)


def build(data: str | Path, out: Path, *options: str) -> list[Record]:
    """The records of a build that succeeds, checked."""
    assert main(["build", "questions", "--data", str(data), "--out", str(out), *options]) == 0
    assert check(str(out / "records.jsonl")) == 0
    return list(JSONLSource(str(out / "records.jsonl")))


def said(records: list[Record]) -> list[tuple[str, str | None, str | None]]:
    return [(record.id, record.question, record.answer) for record in records]


def test_flickr30k_asks_for_each_caption(tmp_path: Path) -> None:
    picture = encoded(noise(1), "JPEG")
    rows = [
        {"image": picture, "caption": ["Two men.", "Men  talk."], "img_id": "7"},
        {"image": encoded(noise(2)), "caption": ["A dog."], "img_id": "8"},
    ]
    records = build(save(rows, FLICKR, tmp_path / "in"), tmp_path / "out")
    ask = "Describe the picture."
    assert said(records) == [("7-0", ask, "Two men."), ("7-1", ask, "Men talk."), ("8", ask, "A dog.")]
    first = records[0]
    assert (first.prompt().instruction, first.caption, first.target, first.task) == (f"[ref#1] {ask}", "Two men.", None, "question")
    assert (tmp_path / "out" / str(first.references[0].image)).read_bytes() == picture
    once = build(tmp_path / "in", tmp_path / "once", "--per-image", "1", "--question", "What is it?", "--max-rows", "1")
    assert said(once) == [("7", "What is it?", "Two men.")]
    assert preview(str(tmp_path / "out" / "records.jsonl"), tmp_path / "page.png").is_file()


def test_rlaifv_answers_as_was_chosen(tmp_path: Path) -> None:
    row = {"image": encoded(noise(1)), "question": "What is [ref#9] that?", "chosen": "A cat.", "rejected": "A dog.", "idx": 3}
    assert said(build(save([row], RLAIFV, tmp_path / "in"), tmp_path / "out")) == [("3", "What is that?", "A cat.")]


def test_ocrvqa_has_many_questions_a_picture_and_loses_no_row_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"image": encoded(noise(1)), "image_id": "b1", "questions": ["Who wrote it?", "Which title?"], "answers": ["A. Bee", "Cats"]}
    rows = [good, {**good, "image_id": "b2", "answers": ["A. Bee"]}, {**good, "image_id": "b3", "answers": ["", "Dogs"]}]
    rows += [{**good, "image_id": "b4", "image": b"no picture"}, {**good, "image_id": "b5", "answers": ["", ""]}]
    records = build(save(rows, OCRVQA, tmp_path / "in"), tmp_path / "out")
    assert said(records) == [("b1-0", "Who wrote it?", "A. Bee"), ("b1-1", "Which title?", "Cats"), ("b3", "Which title?", "Dogs")]
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    told = {"rows": 5, "kept": 3, "bad row": 1, "picture unreadable": 1, "no question with an answer": 1, "answer empty": 3}
    assert {name: counts[name] for name in told} == told
    assert "row 2: bad row: 2 questions, 1 answers" in capsys.readouterr().err


def test_laion_is_read_from_archives(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "00000.tar", "w") as archive:
        for k in range(3):
            for ending, data in (("jpg", encoded(noise(k), "JPEG")), ("txt", f"picture {k}".encode()), ("json", b'{"similarity": 0.3}')):
                info = tarfile.TarInfo(f"00000000{k}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    records = build(tmp_path / "in", tmp_path / "out")
    assert said(records) == [(f"00000000{k}", "Describe the picture.", f"picture {k}") for k in range(3)]
    assert (tmp_path / "out" / str(records[2].references[0].image)).read_bytes() == encoded(noise(2), "JPEG")


def test_a_stopped_build_goes_on_and_shards_make_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": encoded(noise(k)), "question": "What?", "chosen": f"{k}", "idx": k} for k in range(5)]
    data, whole = save(rows, RLAIFV, tmp_path / "in"), tmp_path / "whole"
    expected = said(build(data, whole))
    assert [answer for *_, answer in expected] == ["0", "1", "2", "3", "4"]
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            main(["build", "questions", "--data", data, "--out", str(tmp_path / "stopped")])
    assert said(build(data, tmp_path / "stopped")) == expected
    for shard in ("0/2", "1/2"):
        assert main(["build", "questions", "--data", data, "--out", str(tmp_path / "shards"), "--shard", shard]) == 0
    assert sorted(said(list(JSONLSource(str(tmp_path / "shards" / "records.jsonl"))))) == sorted(expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--format", "ocrvqa"], "has no column 'answers' (--answer-column); there are ds_name, image,"),
        (["--id-column", "name"], "has no column 'name' (--id-column)"),
        (["--question", " "], "--question is empty"),
        (["--per-image", "-1"], "must be 0 or more"),
        (["--images", "/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_what_cannot_be_built_is_one_line(options: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = save([{"image": encoded(noise(1)), "question": "What?", "chosen": "x", "idx": 1}], RLAIFV, tmp_path / "in")
    assert main(["build", "questions", "--data", data, "--out", str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and reason in error


def test_columns_that_tell_no_format_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = save([{"text": "a"}], {"text": TEXT}, tmp_path / "in")
    assert main(["build", "questions", "--data", data, "--out", str(tmp_path / "out")]) == 1
    assert "--format cannot be guessed from the columns text; give one of flickr30k" in capsys.readouterr().err

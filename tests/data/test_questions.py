from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from lightning_mmgen.data.attention import Word, WordMaps, content_hash, write_index, write_shard
from lightning_mmgen.data.order import Position, RecordDataset
from lightning_mmgen.data.questions import QuestionRecipe, VQADataModule
from lightning_mmgen.data.recipe import BadRow
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.models.idefics2 import Idefics2Encoder
from lightning_mmgen.prompt import RecordError
from lightning_mmgen.toybox.world import held_out


def row(id: str, **changes: Any) -> dict[str, Any]:
    reference = {"marker": 1, "image": f"{id}.png", "role": "content"}
    made = {
        "version": 1,
        "instruction": "[ref#1]",
        "references": [reference],
        "task": "question",
        "question": "which colour?",
        "answer": "Red.",
    }
    return {**made, "id": id, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, id in enumerate("abc"):
        PILImage.fromarray(np.random.default_rng(i).integers(0, 255, (12, 20, 3), dtype=np.uint8)).save(tmp_path / f"{id}.png")
    return tmp_path


def save(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def save_targets(folder: Path, ids: str) -> Path:
    out = folder / "targets"
    out.mkdir()
    maps = {
        id: WordMaps(content_hash(f"{id}.png", folder), [Word("red", 0, 3)], torch.full((1, 4, 4), (1 + i) / 255))
        for i, id in enumerate(ids)
    }
    write_shard(out / "00000.safetensors", maps)
    write_index(out, 4)
    return out


def reasons(data: VQADataModule, encoder: Idefics2Encoder | None = None) -> list[str | None]:
    rows = RecordDataset(data.train, data.make_recipe(16, encoder, False), 0)
    items = [rows[Position(i, 0)] for i in range(len(rows))]
    return [item.reason if isinstance(item, BadRow) else None for item in items]


def test_questions_of_a_file_become_a_batch_with_the_targets_of_their_words(folder: Path) -> None:
    data = VQADataModule(save(folder, [row("a"), row("b")]), targets=str(save_targets(folder, "abc")), reference_size=16, batch_size=2)
    data.setup("fit")
    batch, bad = next(iter(data.train_dataloader()))
    assert not bad and sorted(batch.ids) == ["a", "b"] and batch.size == 2
    assert batch.instructions == ["[ref#1] which colour?"] * 2 and batch.answers == ["Red."] * 2 and batch.markers == [[1], [1]]
    assert batch.references[0].pixels.shape == (2, 3, 16, 16)
    for id, targets in zip(batch.ids, batch.targets, strict=True):
        torch.testing.assert_close(targets, {"red": torch.full((4, 4), (1 + "ab".index(id)) / 255)})
    plain = VQADataModule(str(folder / "records.jsonl"), reference_size=16, batch_size=2)
    plain.setup("fit")
    assert next(iter(plain.train_dataloader()))[0].targets is None


def test_rows_that_cannot_be_asked_say_why(folder: Path, encoder: Idefics2Encoder) -> None:
    rows = [
        row("a"),
        row("b", answer=" "),
        row("c", references=[], instruction=""),
        row("d"),
        row("e", question=None, answer=None, target="a.png"),
    ]
    rows.append(row("a", question="why " * 400))
    encoder.max_tokens = 200
    found = reasons(VQADataModule(save(folder, rows), reference_size=16), encoder)
    wanted = [None, "the answer is empty", "has no picture", "d.png", "is no question", "more than max_tokens=200"]
    for reason, part in zip(found, wanted, strict=True):
        assert reason is None if part is None else reason is not None and part in reason and "\n" not in reason


def test_targets_that_are_not_the_pictures_own_say_so(folder: Path) -> None:
    targets = save_targets(folder, "ab")
    PILImage.new("RGB", (20, 12)).save(folder / "b.png")
    first, changed, missing = reasons(VQADataModule(save(folder, [row("a"), row("b"), row("c")]), targets=str(targets), reference_size=16))
    assert first is None
    assert changed is not None and "of another picture, or it has changed" in changed
    assert missing is not None and "has no attention target" in missing


def test_the_toybox_asks_which_colour_which_shape_how_many_and_where() -> None:
    data = VQADataModule("toybox", "toybox", reference_size=64)
    records = [data.train.record(i) for i in range(60)]
    kinds = ("which colour is the", "which shape is", "how many toys", "where is the")
    assert {next(kind for kind in kinds if str(r.question).startswith(kind)) for r in records} == set(kinds)
    assert not any("background" in str(r.question) for r in records)
    assert data.held_out is not None
    for source, held in ((data.train, False), (data.held_out, True)):
        assert all(held_out(tuple(p.toy for p in source.record(i).extra["truth"].scene.toys)) == held for i in range(20))


def test_held_out_questions_come_in_batches_and_may_not_be_bad(folder: Path) -> None:
    source = ToyboxSource({"question": 1.0}, length=5, held_out=True)
    data = VQADataModule(source, source, reference_size=64)
    data.setup("validate")
    batches = data.held_out_batches(5, 2)
    assert [b.size for b in batches] == [2, 2, 1] and [a for b in batches for a in b.answers] == [source.record(i).answer for i in range(5)]
    bad = VQADataModule(source, save(folder, [row("z")]), reference_size=16)
    bad.setup("validate")
    with pytest.raises(RecordError, match=r"a held-out row is bad: .*z\.png"):
        bad.held_out_batches(1, 1)


def test_a_recipe_without_an_encoder_checks_no_lengths() -> None:
    record = ToyboxSource({"question": 1.0}, length=1).record(0)
    sample = QuestionRecipe(32)(record, None, 3)
    assert sample.references[0].shape == (3, 32, 32) and sample.seed == 3 and sample.targets is None

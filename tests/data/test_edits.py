from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_mmgen.batch import Batch
from lightning_mmgen.data.edits import EditDataModule, EditRecipe
from lightning_mmgen.data.order import Position, RecordDataset
from lightning_mmgen.data.recipe import BadRow, Sample, collate
from lightning_mmgen.data.sources import JSONLSource, Source, ToyboxSource, write_jsonl
from lightning_mmgen.diffusion import ConditionDropout, drop_condition
from lightning_mmgen.prompt import Record, Reference
from lightning_mmgen.toybox.tasks import edit_session


def grey(width: int, height: int, value: int = 128) -> Image.Image:
    return Image.new("L", (width, height), value)


def an_edit(**changes: Any) -> Record:
    source, target = grey(32, 32, 10).convert("RGB"), grey(32, 32, 200).convert("RGB")
    record = Record("in [ref#1], make it bright", (Reference(1, source, "picture", "source"),), target, task="edit", mask=grey(32, 32, 255))
    return replace(record, **changes)


def sampled(record: Record, side: int = 16) -> Sample | BadRow:
    class One(Source):
        def __len__(self) -> int:
            return 1

        def record(self, index: int, epoch: int = 0) -> Record:
            return record

        def fingerprint(self) -> str:
            return ""

    return RecordDataset(One(), EditRecipe(16, side), 0)[Position(0, 0)]


def test_source_and_mask_come_in_the_targets_size() -> None:
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    sample = sampled(an_edit(mask=Image.fromarray(mask)))
    assert isinstance(sample, Sample) and sample.source is not None and sample.mask is not None
    assert sample.source.shape == sample.target.shape == (3, 16, 16) and sample.mask.shape == (1, 16, 16)
    torch.testing.assert_close(sample.source, torch.full((3, 16, 16), 10 / 127.5 - 1), rtol=0, atol=1e-5)
    assert (sample.mask[:, :7] == 1).all() and (sample.mask[:, 9:] == 0).all()


def test_wide_pictures_are_cropped_alike() -> None:
    ramp = Image.fromarray(np.linspace(0, 255, 48).astype(np.uint8)[None].repeat(32, 0)).convert("RGB")
    record = an_edit(references=(Reference(1, ramp, "picture", "source"),), target=ramp, mask=ramp.convert("L"))
    sample = sampled(record, side=32)
    assert isinstance(sample, Sample) and sample.source is not None and sample.mask is not None
    assert torch.equal(sample.source, sample.target)
    torch.testing.assert_close(sample.mask, (sample.target[:1] + 1) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mask": grey(31, 32)}, "mask is 31 x 32, source 32 x 32"),
        ({"mask": grey(32, 32, 0)}, "mask is empty: the edit may change nothing"),
        ({"target": grey(32, 40).convert("RGB")}, "source is 32 x 32, target 32 x 40: another aspect"),
        ({"instruction": "make it bright", "references": ()}, "an edit has one reference of the role 'source', not 0"),
        (
            {
                "instruction": "[ref#1] [ref#2]",
                "references": tuple(Reference(k, grey(32, 32).convert("RGB"), "", "source") for k in (1, 2)),
            },
            "an edit has one reference of the role 'source', not 2",
        ),
    ],
)
def test_a_bad_edit_is_a_bad_row(changes: dict[str, Any], reason: str) -> None:
    row = sampled(an_edit(**changes))
    assert isinstance(row, BadRow) and row.reason.endswith(reason)


def test_an_edit_without_a_mask_gets_one_of_what_it_changed() -> None:
    record = ToyboxSource({"edit": 1.0}).record(1)
    given, derived = (sampled(r, side=64) for r in (record, replace(record, mask=None)))
    assert isinstance(given, Sample) and isinstance(derived, Sample) and given.mask is not None and derived.mask is not None
    changed = (given.source - given.target).abs().amax(0, keepdim=True) > 0.3  # type: ignore[operator]
    assert changed.any() and (derived.mask[changed] == 1).all()
    alike = sampled(an_edit(mask=None, target=an_edit().references[0].image))
    assert isinstance(alike, BadRow) and alike.reason.endswith("source and target are alike: there is no edit")


def test_masked_editing_shows_the_mask_in_the_prompt() -> None:
    recipe, rng = EditRecipe(16, 16, show_mask=True), np.random.default_rng(0)
    shown = recipe.compose(an_edit(), None, rng)
    assert shown.instruction == "in [ref#1], make it bright, inside the [ref#2] mask"
    assert [r.role for r in shown.references] == ["source", "mask"] and shown.references[1].image is shown.mask
    for record in (an_edit(mask=None), ToyboxSource({"caption": 1.0}).record(0)):
        assert recipe.compose(record, None, rng) is record


def test_a_full_mask_is_a_global_edit() -> None:
    sample = sampled(an_edit())
    assert isinstance(sample, Sample) and sample.mask is not None and (sample.mask == 1).all()


def batch_of(tasks: dict[str, float], size: int = 32) -> Batch:
    data = EditDataModule(ToyboxSource(tasks), reference_size=16, target_size=64, batch_size=size)
    data.setup("fit")
    batch, bad = next(iter(data.train_dataloader()))
    assert not bad and batch is not None
    return batch  # type: ignore[no-any-return]


def test_in_a_mixture_what_is_no_edit_has_its_target_as_source() -> None:
    batch = batch_of({"edit": 0.5, "caption": 0.5})
    assert batch.edit is not None
    told = torch.tensor([not marks for marks in batch.markers])
    assert 4 < told.sum() < 28
    assert torch.equal(batch.edit.turn, torch.where(told, -1, 0)) and torch.equal(batch.edit.shown, ~told)
    assert torch.equal(batch.edit.source[told], batch.target[told]) and (batch.edit.mask[told] == 1).all()
    assert all(not torch.equal(s, t) for s, t in zip(batch.edit.source[~told], batch.target[~told], strict=True))


def test_outside_the_mask_the_toyboxs_edits_change_nothing() -> None:
    batch = batch_of({"edit": 1.0})
    assert batch.edit is not None
    outside = (batch.edit.mask == 0).expand_as(batch.target)
    assert outside.any() and (batch.edit.source - batch.target).abs()[outside].max() < 1.5 / 127.5  # masks and pictures are rounded


def test_no_batch_of_other_records_has_edits() -> None:
    assert batch_of({"caption": 1.0}).edit is None


def test_where_references_are_dropped_the_unet_sees_no_source_either() -> None:
    batch = batch_of({"edit": 1.0}, 8)
    u = torch.tensor([0.0, 0.04, 0.06, 0.09, 0.11, 0.14, 0.2, 0.9])  # InstructPix2Pix: 5 % both, 5 % text, 5 % pictures
    left = drop_condition(batch, ConditionDropout(both=0.05, text=0.05, references=0.05), u)
    assert left.edit is not None and left.edit.shown.tolist() == [False, False, True, True, False, False, True, True]
    assert left.instructions[:2] == ["", ""] and left.instructions[2:4] == ["[ref#1]", "[ref#1]"]
    assert batch.edit is not None and batch.edit.shown.all() and torch.equal(left.edit.source, batch.edit.source)


def test_turns_of_a_session_travel_through_a_file(tmp_path: Any) -> None:
    source = JSONLSource(str(write_jsonl(edit_session(np.random.default_rng(0), False, 3), tmp_path)))
    batch, bad = collate([RecordDataset(source, EditRecipe(16, 64), 0)[Position(i, 0)] for i in range(3)])
    assert batch is not None and batch.edit is not None and not bad
    assert batch.edit.turn.tolist() == [0, 1, 2]
    assert torch.equal(batch.edit.source[1:], batch.target[:-1])

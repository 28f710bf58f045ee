from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from lightning_mmgen.data.order import Position, RecordDataset
from lightning_mmgen.data.recipe import BadRow, Sample, collate
from lightning_mmgen.data.retrieval import RetrievalDataModule, RetrievalRecipe
from lightning_mmgen.data.sources import JSONLSource, ToyboxSource, write_jsonl
from lightning_mmgen.diffusion import ConditionDropout, drop_condition
from lightning_mmgen.prompt import Record, RecordError, Reference

GREYS = {"a dog": 10, "a dog on grass": 60, "a wet dog": 110, "two dogs": 160, "a dog asleep": 210}
"""A cluster: captions and the grey of their pictures."""


def cluster(neighbours: int = 4, stop: str = ".") -> Record:
    """A pair and its neighbours; the neighbours' captions end with a full stop."""
    pictures = [PILImage.new("RGB", (8, 8), (grey,) * 3) for grey in GREYS.values()]
    words = [caption + stop for caption in GREYS]
    refs = tuple(Reference(k, pictures[k], words[k], "neighbour") for k in range(1, neighbours + 1))
    text = " ".join([*(f"[ref#{r.marker}] {r.phrase}" for r in refs), f"Generate: {words[0]}"])
    return Record(text, refs, pictures[0], words[0], task="retrieval")


def grey(record: Record) -> int:
    return int(record.target.getpixel((0, 0))[0])  # type: ignore[union-attr]


def drawn(record: Record, recipe: RetrievalRecipe, count: int) -> list[Record]:
    return [recipe.compose(record, None, np.random.default_rng(seed)) for seed in range(count)]


def test_three_of_the_neighbours_come_before_the_caption_with_markers_of_their_own() -> None:
    for record in drawn(cluster(), RetrievalRecipe(16, 16), 50):
        captions = re.fullmatch(r"\[ref#1\] (.+)\. \[ref#2\] (.+)\. \[ref#3\] (.+)\. Generate: a dog", record.instruction)
        assert captions and len(set(captions.groups())) == 3 and "a dog" not in captions.groups()
        assert [r.marker for r in record.references] == [1, 2, 3] and grey(record) == GREYS["a dog"]
        for reference, caption in zip(record.references, captions.groups(), strict=True):
            assert reference.image.getpixel((0, 0))[0] == GREYS[caption] and reference.role == "neighbour"  # type: ignore[union-attr]


def test_every_choice_and_order_of_neighbours_is_as_likely_as_the_others() -> None:
    texts = [r.instruction for r in drawn(cluster(), RetrievalRecipe(16, 16), 2400)]
    counts = [texts.count(text) for text in sorted(set(texts))]
    assert len(counts) == 24 and min(counts) > 60 and max(counts) < 145


def test_the_draw_follows_the_sample_and_nothing_else() -> None:
    recipe = RetrievalRecipe(16, 16)
    assert drawn(cluster(), recipe, 9) == drawn(cluster(), recipe, 9)
    assert len({r.instruction for r in drawn(cluster(), recipe, 9)}) > 3


def test_any_pair_may_be_the_target_when_asked_and_its_old_target_a_neighbour() -> None:
    records = drawn(cluster(), RetrievalRecipe(16, 16, swap_target=True), 500)
    assert {grey(r) for r in records} == set(GREYS.values())
    for record in records:
        caption = next(c for c, g in GREYS.items() if g == grey(record))
        assert record.instruction.endswith(f"Generate: {caption}") and caption not in [r.phrase for r in record.references]
    shown = {r.phrase for record in records if grey(record) != 10 for r in record.references}
    assert shown == set(GREYS)


def test_a_swapped_target_leaves_behind_what_was_true_of_the_old_one() -> None:
    record = replace(ToyboxSource({"retrieval": 1.0}).record(0), foil="another scene")
    swapped = drawn(record, RetrievalRecipe(16, 16, swap_target=True), 40)
    assert {bool(r.boxes) for r in swapped} == {True, False}
    assert all(bool(r.boxes) == bool(r.extra) == bool(r.description) == bool(r.foil) == (r.target is record.target) for r in swapped)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (cluster(2), "the cluster has 2 neighbours, fewer than context=3"),
        (replace(cluster(), caption=None), "a pair of the cluster has no caption"),
        (replace(cluster(), references=tuple(replace(r, phrase=". ") for r in cluster().references)), "has no caption"),
    ],
)
def test_a_cluster_that_lacks_something_is_refused(record: Record, reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        RetrievalRecipe(16, 16).compose(record, None, np.random.default_rng(0))


def test_a_context_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="context must be 1 or more, not 0"):
        RetrievalDataModule("toybox", context=0, reference_size=16).setup("fit")


def test_a_missing_picture_is_a_bad_row_whether_it_is_drawn_or_not(tmp_path: Path) -> None:
    source = JSONLSource(str(write_jsonl([cluster(), cluster()], tmp_path)))
    (tmp_path / "pictures" / "000001_ref4.png").unlink()
    data = RecordDataset(source, RetrievalRecipe(16, 16), 0)
    for epoch in range(12):
        assert isinstance(data[Position(0, epoch)], Sample)
        assert data[Position(1, epoch)] == BadRow(1, "row 2: pictures/000001_ref4.png: no such file")


def test_dropping_the_context_leaves_the_caption_and_none_of_the_neighbours_words() -> None:
    data = RetrievalDataModule("toybox", reference_size=16, target_size=16, batch_size=8)
    data.setup("fit")
    batch, _ = next(iter(data.train_dataloader()))
    left = drop_condition(batch, ConditionDropout(both=0.0, references=1.0), torch.rand(8))
    assert left.instructions == [f"Generate: {caption}" for caption in batch.captions] and left.references == []
    assert all(len(marks) == 3 for marks in batch.markers) and all(t.count("[ref#") == 3 for t in batch.instructions)


def test_the_papers_dropout_takes_both_and_the_context_a_tenth_of_the_time_each() -> None:
    batch, _ = collate([RecordDataset(ToyboxSource({"retrieval": 1.0}), RetrievalRecipe(8, 8), 0)[Position(0, 0)]] * 2000)
    assert batch is not None
    draws = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    texts = drop_condition(batch, ConditionDropout(both=0.1, references=0.1), draws).instructions
    assert abs(texts.count("") / 2000 - 0.1) < 0.02 and abs(texts.count(f"Generate: {batch.captions[0]}") / 2000 - 0.1) < 0.02


def test_the_held_out_set_keeps_its_targets() -> None:
    data = RetrievalDataModule("toybox", "toybox", swap_target=True, reference_size=16, target_size=16)
    data.setup("fit")
    held = ToyboxSource({"retrieval": 1.0}, length=256, held_out=True)
    assert [r.caption for r in data.held_out_records(30)] == [held.record(i).caption for i in range(30)]
    trained = [data.recipe.compose(data.train.record(i), None, np.random.default_rng(i)).caption for i in range(30)]
    assert sum(a != data.train.record(i).caption for i, a in enumerate(trained)) > 10

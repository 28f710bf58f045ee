from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor

from lightning_mmgen.batch import Batch, pack
from lightning_mmgen.data.datamodule import MultimodalDataModule
from lightning_mmgen.data.images import crop_square
from lightning_mmgen.data.order import OrderedSampler, Position, RecordDataset
from lightning_mmgen.data.recipe import BadRow, Recipe, Sample, collate, sample_seed
from lightning_mmgen.data.sources import JSONLSource, ToyboxSource, write_jsonl
from lightning_mmgen.prompt import Record, RecordError, Reference

TASKS = {"caption": 1.0, "subject": 1.0, "crops": 1.0}
RECIPE = Recipe(16, 32)

# -- order -----------------------------------------------------------------------------------------------------------------------


def slow_batches(length: int, batch_size: int, seed: int, epoch: int, rank: int, world: int) -> list[list[Position]]:
    """One epoch of one rank, sample by sample: sample p of the order goes to batch p // (b w) of rank p % w."""
    order = np.random.default_rng((seed, epoch)).permutation(length)
    whole = length // (batch_size * world)
    batches: list[list[Position]] = [[] for _ in range(whole)]
    for place in range(whole * batch_size * world):
        if place % (batch_size * world) % world == rank:
            batches[place // (batch_size * world)].append(Position(int(order[place]), epoch))
    return batches


def sampler(length: int, batch_size: int, rank: int = 0, world: int = 1, *, epoch: int = 0, start: int = 0) -> OrderedSampler:
    out = OrderedSampler(length, batch_size, 5, rank, world)
    out.epoch, out.start = epoch, start
    return out


@pytest.mark.parametrize(("length", "batch_size", "world"), [(12, 3, 1), (13, 3, 1), (40, 4, 2), (47, 4, 3), (6, 2, 3)])
def test_the_order_equals_a_plain_recomputation(length: int, batch_size: int, world: int) -> None:
    for epoch in (0, 3):
        for rank in range(world):
            one = sampler(length, batch_size, rank, world, epoch=epoch)
            assert list(one) == slow_batches(length, batch_size, 5, epoch, rank, world)
            assert len(one) == len(list(one)) and all(len(batch) == batch_size for batch in one)


def test_epochs_and_seeds_differ_and_every_row_comes_once() -> None:
    first, second = (sampler(12, 3).order(epoch).tolist() for epoch in (0, 1))
    assert first != second and sorted(first) == sorted(second) == list(range(12))
    assert OrderedSampler(12, 3, 6).order(0).tolist() != first


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_slice_one_global_order(world: int) -> None:
    ranks = [list(sampler(24, 2, rank, world)) for rank in range(world)]
    order = iter(sampler(24, 2).order(0).tolist())
    for step in range(24 // (2 * world)):
        for place in range(2 * world):  # rank by rank, then the next place of each
            assert ranks[place % world][step][place // world].index == next(order)


def test_resume_from_the_middle_gives_exactly_the_remaining_batches() -> None:
    for rank in range(2):
        whole = list(sampler(47, 4, rank, 2, epoch=1))
        for done in range(len(whole) + 1):
            assert list(sampler(47, 4, rank, 2, epoch=1, start=done * 8)) == whole[done:]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (3, 4), (4, 2)])
def test_another_number_of_ranks_neither_loses_nor_repeats(before: int, after: int) -> None:
    size = {1: 12, 2: 6, 3: 4, 4: 3}  # the global batch stays at 12
    first = [list(sampler(60, size[before], rank, before))[:2] for rank in range(before)]
    rest = [list(sampler(60, size[after], rank, after, start=24)) for rank in range(after)]
    seen = sorted(position.index for run in (*first, *rest) for batch in run for position in batch)
    assert seen == list(range(60))


@pytest.mark.parametrize("start", [2, 4, 10, 12])
def test_another_global_batch_still_gives_whole_batches_of_the_rest(start: int) -> None:
    ranks = [list(sampler(18, 2, rank, 3, start=start)) for rank in range(3)]
    order, whole = sampler(18, 2).order(0).tolist(), (18 - start) // 6
    assert all(len(batch) == 2 for batches in ranks for batch in batches)
    seen = [p.index for batches in zip(*ranks, strict=True) for batch in batches for p in batch]
    assert sorted(seen) == sorted(order[start : start + 6 * whole])


def test_seek_goes_on_to_the_next_epoch_where_no_whole_batch_is_left() -> None:
    one = sampler(18, 3, 0, 2)
    assert one.seek(1, 12) == (1, 12) and one.seek(1, 13) == (2, 0) and one.seek(1, 18) == (2, 0)


def test_evaluation_takes_every_row_in_its_order() -> None:
    batches = list(OrderedSampler(10, 4, None))
    assert [[p.index for p in batch] for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(OrderedSampler(10, 4, None)) == 3


def test_fewer_rows_than_a_global_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="7 rows, fewer than one batch of 8"):
        OrderedSampler(7, 4, 0, 0, 2)


def test_sample_seeds_are_63_bit_and_differ() -> None:
    seeds = {sample_seed(s, e, i) for s in range(3) for e in range(3) for i in range(50)}
    assert len(seeds) == 450 and all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**60
    assert sample_seed(1, 2, 3) == sample_seed(1, 2, 3)


# -- samples and batches ---------------------------------------------------------------------------------------------------------


def test_crop_square_takes_the_centre_unchanged_where_the_size_fits() -> None:
    picture = torch.rand(3, 6, 11) * 2 - 1
    assert torch.equal(crop_square(picture, 6), picture[:, :, 2:8])
    assert torch.equal(crop_square(picture.transpose(1, 2), 6), picture[:, :, 2:8].transpose(1, 2))


@pytest.mark.parametrize("side", [10, 48])
def test_crop_square_resizes_as_pillow_does(side: int) -> None:
    grey = torch.from_numpy(np.random.default_rng(0).random((24, 24), np.float32) * 2 - 1)
    expected = np.array(PILImage.fromarray(grey.numpy()).resize((side, side), PILImage.Resampling.BICUBIC)).clip(-1, 1)
    out = crop_square(torch.nn.functional.pad(grey[None].expand(3, -1, -1), (5, 5)), side)
    torch.testing.assert_close(out[0].numpy(), expected, rtol=0, atol=1e-4)


def test_the_recipe_makes_squares_of_its_sizes() -> None:
    for record in ToyboxSource(TASKS, length=6):
        sample = RECIPE(record, None, 9)
        assert sample.record is record and sample.seed == 9 and sample.target.shape == (3, 32, 32)
        assert [p.shape for p in sample.references] == [(3, 16, 16)] * len(record.references)
        assert all(p.abs().max() <= 1 for p in (sample.target, *sample.references))


def test_the_recipe_refuses_a_question() -> None:
    question = ToyboxSource({"question": 1.0}).record(0)
    with pytest.raises(RecordError, match="target is missing"):
        RECIPE(question, None, 0)


def sample(text: str, markers: list[int], pictures: list[Tensor], seed: int) -> Sample:
    references = tuple(Reference(k, "a.png") for k in markers)
    return Sample(Record(text, references, "t.png", id=f"row-{seed}"), pictures, torch.full((3, 4, 4), seed / 10), seed)


def test_collate_and_pack_keep_every_picture_with_its_sample_and_slot() -> None:
    small, large = [torch.full((3, 2, 2), float(v)) for v in range(3)], [torch.full((3, 4, 4), float(v)) for v in range(3, 5)]
    batch, bad = collate(
        [
            sample("[ref#2] and [ref#1]", [2, 1], [small[0], large[0]], 1),
            sample("words", [], [], 2),
            sample("[ref#7] [ref#8] [ref#9]", [7, 8, 9], [small[1], large[1], small[2]], 3),
        ]
    )
    assert batch is not None and bad == [] and batch.size == 3
    assert batch.markers == [[2, 1], [], [7, 8, 9]] and batch.ids == ["row-1", "row-2", "row-3"] and batch.captions == [""] * 3
    assert batch.target.shape == (3, 3, 4, 4) and batch.target[:, 0, 0, 0].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert batch.seed.dtype == torch.int64 and batch.seed.tolist() == [1, 2, 3]
    groups = [(g.pixels[:, 0, 0, 0].tolist(), g.sample.tolist(), g.slot.tolist(), g.pixels.shape[-1]) for g in batch.references]
    assert groups == [([0, 1, 2], [0, 2, 2], [0, 0, 2], 2), ([3, 4], [0, 2], [1, 1], 4)]
    assert pack([[], []]) == []


def test_a_caption_stands_in_for_a_description() -> None:
    rows = [{}, {"caption": "a"}, {"caption": "a", "description": "a red one", "foil": "a blue one"}]
    batch, _ = collate([Sample(Record("draw", target="t.png", **row), [], torch.zeros(3, 4, 4), 0) for row in rows])
    assert batch is not None and (batch.captions, batch.descriptions) == (["", "a", "a"], ["", "a", "a red one"])
    assert batch.foils == ["", "", "a blue one"]


def test_a_batch_of_bad_rows_is_no_batch() -> None:
    assert collate([BadRow(3, "no"), BadRow(4, "no")]) == (None, [BadRow(3, "no"), BadRow(4, "no")])


@pytest.fixture
def damaged(tmp_path: Path) -> JSONLSource:
    """Twelve rows; row 4 lacks its target's file, row 7 is not JSON."""
    path = write_jsonl(ToyboxSource({"subject": 1.0}, length=12), tmp_path)
    lines = path.read_text().splitlines()
    (tmp_path / json.loads(lines[4])["target"]).unlink()
    lines[7] = "{"
    path.write_text("\n".join(lines) + "\n")
    return JSONLSource(str(path))


def test_a_bad_row_leaves_its_place_and_is_never_replaced(damaged: JSONLSource) -> None:
    data = MultimodalDataModule(damaged, target_size=32, reference_size=16, batch_size=3, seed=5, bad_rows=0.5)
    data.setup("fit")
    bad_rows: dict[int, str] = {}
    batches = list(data.train_dataloader())
    assert len(batches) == 4
    for (good, bad), positions in zip(batches, slow_batches(12, 3, 5, 0, 0, 1), strict=True):
        kept = [p.index for p in positions if p.index not in (4, 7)]
        assert good.ids == [damaged.record(i).id for i in kept]
        assert good.seed.tolist() == [sample_seed(5, 0, i) for i in kept]
        assert [row.index for row in bad] == [p.index for p in positions if p.index in (4, 7)]
        bad_rows |= {row.index: row.reason for row in bad}
        assert data.on_before_batch_transfer((good, bad), 0) is good
    assert bad_rows[4].startswith("row 5: ") and "no such file" in bad_rows[4] and bad_rows[7].startswith("records.jsonl:8: not JSON")
    assert data.bad == bad_rows


def test_more_bad_rows_than_allowed_stop_the_run(damaged: JSONLSource) -> None:
    with pytest.raises(RecordError, match="2 of the first 12 rows are bad"):
        MultimodalDataModule(damaged, target_size=32, reference_size=16).setup("fit")
    data = MultimodalDataModule(damaged, target_size=32, reference_size=16, batch_size=12, check=0, bad_rows=0.1)
    data.setup("fit")
    with pytest.raises(RecordError, match="2 of 12 rows are bad, more than bad_rows=0.1"):
        data.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)


def test_an_unreadable_row_says_where_it_is(damaged: JSONLSource) -> None:
    item = RecordDataset(damaged, RECIPE, 0)[Position(7, 0)]
    assert isinstance(item, BadRow) and item.index == 7 and item.reason.startswith("records.jsonl:8: ")


# -- the module ------------------------------------------------------------------------------------------------------------------


def module(workers: int = 0) -> MultimodalDataModule:
    source = ToyboxSource(TASKS, length=14, seed=2)
    data = MultimodalDataModule(source, source, target_size=32, reference_size=16, batch_size=3, seed=5, workers=workers)
    data.setup("fit")
    return data


def take(data: MultimodalDataModule, count: int) -> list[Batch]:
    """The next ``count`` batches, epoch after epoch, counted as consumed."""
    out: list[Batch] = []
    loader = data.train_dataloader()
    while len(out) < count:
        for batch in loader:
            out.append(data.on_before_batch_transfer(batch, 0))  # type: ignore[arg-type]
            data.advance()
            if len(out) == count:
                break
    return out


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert [x.ids for x in a] == [y.ids for y in b] and [x.seed.tolist() for x in a] == [y.seed.tolist() for y in b]
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.target, y.target)
        assert all(torch.equal(g.pixels, h.pixels) for g, h in zip(x.references, y.references, strict=True))


def test_the_data_follow_the_order_epoch_by_epoch() -> None:
    batches = take(module(), 10)  # four batches an epoch
    for epoch in (0, 1, 2):
        expected = [[sample_seed(5, epoch, p.index) for p in positions] for positions in slow_batches(14, 3, 5, epoch, 0, 1)]
        assert [b.seed.tolist() for b in batches[4 * epoch : 4 * epoch + 4]] == expected[: 10 - 4 * epoch]


@pytest.mark.parametrize("stop", [1, 4, 6])  # within the first epoch, at its end, within the second
def test_a_resumed_module_goes_on_bit_by_bit(stop: int) -> None:
    whole, first = take(module(), 9), module()
    assert_equal(take(first, stop), whole[:stop])
    second = module()
    second.load_state_dict(first.state_dict())
    assert_equal(take(second, 9 - stop), whole[stop:])
    assert second.state_dict()["epoch"] == 2 and second.state_dict()["consumed"] == 3


def test_worker_processes_change_nothing() -> None:
    assert_equal(take(module(workers=2), 6), take(module(), 6))


class Probe(L.LightningModule):
    """Notes the samples that it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), list[list[int]]()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append(batch.seed.tolist())
        return self.weight * batch.target.mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert batch.size

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())


def fit(data: MultimodalDataModule, folder: Path, **options: Any) -> list[list[int]]:
    """Train a probe, its reports in ``folder``; the seeds of its batches."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    probe = Probe()
    L.Trainer(accelerator="cpu", use_distributed_sampler=False, default_root_dir=folder, **quiet, **options).fit(probe, datamodule=data)
    return probe.seen


def seeds(data: MultimodalDataModule, epoch: int) -> list[list[int]]:
    batches = slow_batches(len(data.train), data.batch_size, 5, epoch, 0, 1)
    return [[sample_seed(5, epoch, p.index) for p in batch] for batch in batches]


def test_short_epochs_of_the_trainer_go_on_where_the_last_one_ended(tmp_path: Path) -> None:
    data = module()
    assert fit(data, tmp_path, max_epochs=3, limit_train_batches=2, limit_val_batches=0) == [*seeds(data, 0), *seeds(data, 1)[:2]]


def test_a_batch_of_bad_rows_is_counted_and_left_out(damaged: JSONLSource, tmp_path: Path) -> None:
    data = MultimodalDataModule(damaged, target_size=32, reference_size=16, batch_size=1, seed=5, bad_rows=0.5)
    kept = [[b for b in seeds(data, e) if b not in ([sample_seed(5, e, 4)], [sample_seed(5, e, 7)])] for e in (0, 1)]
    assert fit(data, tmp_path, max_epochs=2) == kept[0] + kept[1]
    assert data.state_dict()["epoch"] == 2 and set(data.bad) == {4, 7}


def test_a_bad_held_out_row_is_an_error(damaged: JSONLSource, tmp_path: Path) -> None:
    data = MultimodalDataModule(ToyboxSource(TASKS, length=12), damaged, target_size=32, reference_size=16, batch_size=3)
    with pytest.raises(RecordError, match="a held-out row is bad: row 5: "):
        fit(data, tmp_path, max_epochs=1)


def test_a_checkpoint_of_another_data_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="made with data seed 8, not 5"):
        module().load_state_dict({**module().state_dict(), "seed": 8})


def test_held_out_records_are_read_in_order_and_all_of_them() -> None:
    data = module()
    batches = [good for good, _ in data.val_dataloader()]
    assert [i for batch in batches for i in batch.ids] == [r.id for r in data.held_out_records(99)] and len(data.held_out_records(99)) == 14
    assert len(data.held_out_records(5)) == 5
    alone = MultimodalDataModule(ToyboxSource(TASKS, length=4), batch_size=2)
    assert alone.val_dataloader() == [] and alone.held_out_records(3) == []

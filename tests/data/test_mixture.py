from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from lightning_mmgen.data.datamodule import MultimodalDataModule
from lightning_mmgen.data.mixture import Mixture, apportion, shuffled
from lightning_mmgen.data.order import Position, RecordDataset
from lightning_mmgen.data.recipe import BadRow, Recipe, Sample
from lightning_mmgen.data.sources import JSONLSource, Source, ToyboxSource, write_jsonl
from lightning_mmgen.prompt import Record

PICTURE = PILImage.new("RGB", (4, 4))
RATIOS = {"one": 0.5, "two": 0.3, "three": 0.2}


class Rows(Source):
    """Rows that say their number and how often they were walked before."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def record(self, index: int, epoch: int = 0) -> Record:
        return Record(f"{index}/{epoch}", (), PICTURE)

    def fingerprint(self) -> str:
        return str(self.count)


def mixture(length: int | None = None, seed: int = 0, *, repeat: bool = True, counts: tuple[int, int, int] = (100, 90, 80)) -> Mixture:
    return Mixture({name: Rows(n) for name, n in zip(RATIOS, counts, strict=True)}, RATIOS, length, seed, repeat)


def seen(mix: Mixture, epochs: int) -> list[tuple[str, int, int]]:
    """(source, row, walks before) of every record of so many epochs."""
    records = [mix.record(i, epoch) for epoch in range(epochs) for i in range(len(mix))]
    return [(r.task, *map(int, r.instruction.split("/"))) for r in records]  # type: ignore[misc]


# -- permutations ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000])
def test_a_shuffle_takes_every_index_to_a_place_of_its_own(length: int) -> None:
    for key in ("a", "b"):
        assert sorted(shuffled(i, length, key) for i in range(length)) == list(range(length))


def test_shuffles_of_different_keys_have_nothing_in_common() -> None:
    a, b = (np.array([shuffled(i, 5000, key) for i in range(5000)]) for key in ("0/1", "0/2"))
    assert (a == b).sum() < 10 and abs(np.corrcoef(a, b)[0, 1]) < 0.05 and abs(np.corrcoef(a, np.arange(5000))[0, 1]) < 0.05


def test_every_place_of_a_small_shuffle_is_as_likely_as_the_others() -> None:
    first = Counter(shuffled(0, 10, str(key)) for key in range(5000))
    assert len(first) == 10 and min(first.values()) > 400 and max(first.values()) < 600


@pytest.mark.parametrize(("shares", "total"), [([0.5, 0.3, 0.2], 10), ([0.15, 0.05, 0.8], 33), ([1 / 3] * 3, 100), ([0.1] * 10, 7)])
def test_apportioned_numbers_sum_to_the_total_and_are_within_one_of_the_shares(shares: list[float], total: int) -> None:
    counts = apportion(shares, total)
    assert sum(counts) == total and all(abs(count - share * total) < 1 for count, share in zip(counts, shares, strict=True))


# -- shares and order ------------------------------------------------------------------------------------------------------------


def test_shares_match_the_ratios_over_twenty_thousand_draws_and_within_any_stretch_of_them() -> None:
    mix = mixture(20_000, counts=(300, 7000, 40_000))
    sources = np.array([mix.locate(i)[0] for i in range(20_000)])
    assert [int((sources == k).sum()) for k in range(3)] == [10_000, 6_000, 4_000]
    for stretch in sources.reshape(20, 1000):
        assert [abs((stretch == k).mean() - ratio) < 0.06 for k, ratio in enumerate(RATIOS.values())] == [True] * 3


def test_a_source_is_walked_wholly_before_it_starts_over_and_in_another_order() -> None:
    mix = mixture(70, counts=(20, 90, 80))
    for name, rows in (("one", 20), ("two", 90), ("three", 80)):
        walks: dict[int, list[int]] = {}
        for task, row, walked in seen(mix, 9):
            if task == name:
                walks.setdefault(walked, []).append(row)
        *whole, last = (walks[w] for w in sorted(walks))
        assert all(sorted(walk) == list(range(rows)) for walk in whole) and len(set(last)) == len(last)
        assert sorted(walks) == list(range(len(walks))) and len({tuple(walk) for walk in whole}) == len(whole)
    assert sum(task == "one" for task, _, _ in seen(mix, 9)) == 9 * 35  # 15 walks and three quarters of another


def test_the_order_is_a_pure_function_of_seed_epoch_and_index() -> None:
    forward, back = mixture(60), mixture(60)
    whole = [forward.locate(i, epoch) for epoch in range(3) for i in range(60)]
    assert whole == [back.locate(i, epoch) for epoch in reversed(range(3)) for i in reversed(range(60))][::-1]
    assert whole[:60] != whole[60:120] != [mixture(60, seed=1).locate(i, 1) for i in range(60)]


def test_an_epoch_is_by_default_as_long_as_no_source_starts_over_within_it() -> None:
    mix = mixture(counts=(100, 30, 60))  # 200, 100 and 300 records
    assert len(mix) == 100 and mix.counts == [50, 30, 20]
    rows = [row for task, row, _ in seen(mix, 1) if task == "two"]
    assert sorted(rows) == list(range(30))


def loaded(mix: Mixture, workers: int = 0, start: tuple[int, int] = (0, 0), epochs: int = 2) -> list[tuple[list[str], list[int]]]:
    """Texts and seeds of every batch of so many epochs."""
    data = MultimodalDataModule(mix, target_size=4, reference_size=4, batch_size=8, workers=workers, seed=3)
    data.setup("fit")
    data._resume = start
    out = []
    for _ in range(start[0], epochs):
        for batch, bad in data.train_dataloader():
            assert not bad
            out.append(([f"{t} {i}" for t, i in zip(batch.instructions, batch.ids, strict=True)], batch.seed.tolist()))
            data.advance()
    return out


def test_loader_workers_and_a_resume_in_the_middle_give_the_same_sequence() -> None:
    whole = loaded(mixture(203))
    assert len(whole) == 50 and loaded(mixture(203), workers=2) == whole
    assert loaded(mixture(203), start=(1, 7 * 8)) == whole[25 + 7 :]


# -- records ---------------------------------------------------------------------------------------------------------------------


def jsonl(folder: Path, task: str, count: int) -> JSONLSource:
    return JSONLSource(str(write_jsonl(ToyboxSource({task: 1.0}, length=count), folder)))


def test_pictures_are_read_from_the_folder_of_their_own_source(tmp_path: Path) -> None:
    sources = {"one": jsonl(tmp_path / "a", "subject", 6), "two": jsonl(tmp_path / "b", "style", 6)}
    mix = Mixture(sources, {"one": 0.5, "two": 0.5})
    data = RecordDataset(mix, Recipe(16, 64), 0)
    for i in range(len(mix)):
        k, row, _ = mix.locate(i)
        sample = data[Position(i, 0)]
        expected = Recipe(16, 64)(list(sources.values())[k].record(row), list(sources.values())[k].root, 0)
        assert isinstance(sample, Sample) and sample.record.task == ("one", "two")[k]
        assert (sample.target == expected.target).all() and len(sample.references) == len(expected.references)


def test_a_bad_row_is_named_by_its_source_and_is_the_same_row_every_epoch(tmp_path: Path) -> None:
    sources = {"one": jsonl(tmp_path / "a", "caption", 6), "two": jsonl(tmp_path / "b", "caption", 6)}
    (tmp_path / "b" / json.loads((tmp_path / "b" / "records.jsonl").read_text().splitlines()[4])["target"]).unlink()
    (tmp_path / "b" / "pictures" / "000002_target.png").write_bytes(b"no picture")
    data = RecordDataset(Mixture(sources, {"one": 0.5, "two": 0.5}), Recipe(16, 64), 0)
    for epoch in range(3):
        bad = sorted(item for i in range(12) if isinstance(item := data[Position(i, epoch)], BadRow))
        assert [row.index for row in bad] == [8, 10]
        assert bad[0].reason.startswith("two row 3: ") and "not a picture" in bad[0].reason
        assert bad[1].reason == "two:5: pictures/000004_target.png: no such file"


def test_bad_rows_that_are_few_of_what_was_drawn_do_not_stop_a_long_training() -> None:
    data = MultimodalDataModule(mixture(40, counts=(1000, 900, 800)), target_size=4, reference_size=4, batch_size=4, bad_rows=0.05)
    data.setup("fit")
    data.train_dataloader()
    for row in range(6):  # one in 40 of what was drawn, more than one in 20 of an epoch
        data.advance(10)
        data.on_before_batch_transfer((None, [BadRow(row, "no")]), 0)
    assert len(data.bad) == 6 > 0.05 * len(data.train)


def test_the_fingerprint_follows_what_the_mixture_holds() -> None:
    prints = [m.fingerprint() for m in (mixture(), mixture(), mixture(50), mixture(seed=1), mixture(counts=(101, 90, 80)))]
    assert prints[0] == prints[1] and len(set(prints)) == 4


# -- errors ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "reason"),
    [
        ({"one": 0.5, "two": 0.4}, "ratios must sum to 1, not 0.9: one 0.5, two 0.4"),
        ({"one": 1.5, "two": -0.5}, "ratios must be over 0: one 1.5, two -0.5"),
        ({"one": 1.0, "two": 0.0}, "ratios must be over 0: one 1, two 0"),
        ({"one": 1.0}, "sources but no ratios for two"),
        ({"one": 0.5, "two": 0.3, "three": 0.2}, "ratios but no sources for three"),
    ],
)
def test_ratios_that_are_no_shares_of_the_sources_are_refused(ratios: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Mixture({"one": Rows(5), "two": Rows(5)}, ratios)


def test_an_empty_source_and_one_without_a_place_are_refused() -> None:
    with pytest.raises(ValueError, match="the source of two holds no rows"):
        mixture(counts=(5, 0, 5))
    with pytest.raises(ValueError, match="an epoch of 2 records is too short for the ratio 0.2 of three"):
        mixture(2)


def test_a_source_that_may_not_repeat_and_has_no_rows_left_is_an_error_and_no_bad_row() -> None:
    with pytest.raises(ValueError, match="needs 50 of one, which has 49 and does not repeat"):
        mixture(100, repeat=False, counts=(49, 90, 80))
    data = RecordDataset(mixture(100, repeat=False), Recipe(4, 4), 0)
    assert all(isinstance(data[Position(i, 0)], Sample) for i in range(100))
    assert all(isinstance(data[Position(i, 1)], Sample) for i in range(100))  # the last fifty rows of "one"
    with pytest.raises(ValueError, match="one has no rows left in epoch 2: all 100 were used, and it does not repeat"):
        [data[Position(i, 2)] for i in range(100)]

"""Pairs of rows, and the term of the loss that looks at their differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_mmgen.cli import main
from lightning_mmgen.data.pairs import PairedDataModule
from lightning_mmgen.data.recipe import sample_seed
from lightning_mmgen.data.sources import JSONLSource, ToyboxSource, write_jsonl
from lightning_mmgen.losses import difference, squared_error
from lightning_mmgen.toybox.world import TRAITS

TASKS = {"measured": 0.5, "measured alone": 0.5}
TWINS = {f"{name} twin": share for name, share in TASKS.items()}


def pairs(train: Any, other: Any, **more: Any) -> PairedDataModule:
    data = PairedDataModule(train, other, target_size=32, reference_size=16, batch_size=4, **more)
    data.setup("fit")
    return data


def test_partners_lie_side_by_side_and_share_all_but_their_measures() -> None:
    first, second = ToyboxSource(TASKS, length=12), ToyboxSource(TWINS, length=12)
    data = pairs(first, second, seed=5)
    for (batch, bad), places in zip(data.train_dataloader(), data.sampler(), strict=True):
        rows = [p.index for p in places]
        assert not bad and batch.size == 8
        assert batch.seed.tolist() == [sample_seed(5, 0, i) for i in rows] * 2
        assert batch.instructions == [source.record(i).instruction for source in (first, second) for i in rows]
        assert not torch.equal(*batch.target.chunk(2))


def test_twins_mirror_every_trait_and_nothing_else() -> None:
    lone = 0
    for one, other in zip(ToyboxSource(TASKS, length=40), ToyboxSource(TWINS, length=40), strict=True):
        scenes = [r.extra["truth"].scene for r in (one, other)]
        assert (scenes[0].background, scenes[0].style, scenes[0].place) == (scenes[1].background, scenes[1].style, scenes[1].place)
        for a, b in zip(scenes[0].toys, scenes[1].toys, strict=True):
            assert (a.size, a.x, a.y, a.toy.words()) == (b.size, b.x, b.y, b.toy.words())
            for name, (low, high) in TRAITS.items():
                assert (getattr(a.toy, name) - low) == pytest.approx(high - getattr(b.toy, name))
        lone += scenes[0].background == "grey" and "[ref" not in one.instruction and len(scenes[0].toys) == 1
        assert one.instruction.translate(str.maketrans("", "", "0123456789")) == other.instruction.translate(
            str.maketrans("", "", "0123456789")
        )
    assert 10 < lone < 30


def test_a_bad_row_takes_its_partner_with_it(tmp_path: Path) -> None:
    sources = []
    for name, bad in (("first", 2), ("second", 5)):
        (tmp_path / name).mkdir()
        path = write_jsonl(ToyboxSource({"caption": 1.0}, length=8), tmp_path / name)
        (path.parent / str(JSONLSource(str(path)).record(bad).target)).unlink()
        sources.append(str(path))
    data = pairs(*sources, bad_rows=0.5)
    kept, lost = [], []
    for batch, bad in data.train_dataloader():
        assert torch.equal(*batch.target.chunk(2)) and torch.equal(*batch.seed.chunk(2))
        kept += batch.ids[: batch.size // 2]
        lost += [row.index for row in bad]
    assert sorted(lost) == [2, 5] and len(kept) == 6


def test_sources_of_two_lengths_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="not 8 rows .train. and 9 .other."):
        PairedDataModule(ToyboxSource(TASKS, length=8), ToyboxSource(TWINS, length=9))


def test_the_error_of_a_pair_is_half_its_sums_and_half_its_differences() -> None:
    prediction, target = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    slow = torch.stack([((prediction[i] - prediction[i + 3]) - (target[i] - target[i + 3])) for i in range(3)]).square().mean() / 2
    torch.testing.assert_close(difference(prediction, target), slow)
    r = prediction - target
    whole = squared_error(prediction, target).mean() * 2  # of a pair: the sum of two
    torch.testing.assert_close(slow + (r[:3] + r[3:]).square().mean() / 2, whole)


def test_what_both_partners_miss_alike_does_not_count() -> None:
    prediction = torch.randn(3, 4, 3, 3).repeat(2, 1, 1, 1)
    target, common = torch.randn(6, 4, 3, 3), torch.randn(3, 4, 3, 3).repeat(2, 1, 1, 1)
    torch.testing.assert_close(difference(prediction + 9 * common, target), difference(prediction, target))


ROWS = "[{match: encoder, train: frozen},{match: adapter, train: full, lr: 1.0e-3},{match: unet, train: frozen}]"
PAIRED = [
    f"--model.init_args.parameters={ROWS}",
    "--data={class_path: PairedDataModule, init_args: {train: toybox, other: toybox, target_size: 16, batch_size: 2}}",
    "--trainer.max_steps=2",
    "--trainer.callbacks+={class_path: PairDifference, init_args: {weight: 0.5}}",
]


def test_the_term_is_the_difference_of_each_steps_predictions(experiment: Path, tmp_path: Path) -> None:
    class Watch(L.Callback):
        seen: list[tuple[float, float]] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                step = module.denoising_step(batch)
                loss = module.loss(step)
            target = module.diffusion.target(step.z0, step.noise, step.timesteps)
            assert not torch.equal(*batch.target.chunk(2)) and torch.equal(*step.timesteps.chunk(2)) and torch.equal(*step.noise.chunk(2))
            self.seen.append((float(loss["difference"]), float(difference(step.prediction, target))))

    watch = Watch()
    cli = main(["-c", str(experiment), *PAIRED, f"--trainer.logger.init_args.save_dir={tmp_path}"], run=False)
    cli.trainer.callbacks.append(watch)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert len(watch.seen) == 2
    for term, plain in watch.seen:
        assert term == pytest.approx(0.5 * plain) and term > 0


def test_a_batch_without_pairs_is_an_error(experiment: Path, tmp_path: Path) -> None:
    args = [a for a in PAIRED if not a.startswith("--data")]
    with pytest.raises(ValueError, match="partners of the first .data: PairedDataModule"):
        main(["fit", "-c", str(experiment), *args, f"--trainer.logger.init_args.save_dir={tmp_path}"])

"""The LightningModule: its step, its noise, its learning rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_mmgen.cli import main
from lightning_mmgen.data.recipe import sample_seed
from lightning_mmgen.diffusion import Diffusion
from lightning_mmgen.module import SampleNoise


def test_a_samples_noise_depends_on_its_own_seed_alone() -> None:
    diffusion = Diffusion(offset_noise=0.1)
    together = SampleNoise(torch.tensor([5, 6, 7]), (2, 4, 4), diffusion)
    alone = SampleNoise(torch.tensor([6]), (2, 4, 4), diffusion)
    for name in ("timesteps", "noise", "posterior", "dropout"):
        assert torch.equal(getattr(together, name)[1], getattr(alone, name)[0])
    assert not torch.equal(together.noise[0], together.noise[1])


def test_noise_is_what_it_is_called() -> None:
    draw = SampleNoise(torch.tensor([sample_seed(0, 0, i) for i in range(4000)]), (1, 4, 4), Diffusion())
    assert abs(float(draw.noise.mean())) < 0.02 and abs(float(draw.noise.std()) - 1) < 0.02
    assert draw.timesteps.min() < 10 and draw.timesteps.max() > 989
    assert abs(float((draw.dropout < 0.1).float().mean()) - 0.1) < 0.02


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rates_count_optimizer_steps(accumulate: int, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recorder = {"class_path": "tests.recorder.LossRecorder", "init_args": {"out": str(tmp_path / "losses.jsonl")}}
    args = [
        "--model.init_args.schedule={warmup: 2, decay: linear}",
        "--trainer.max_steps=4",
        f"--trainer.callbacks+={json.dumps(recorder)}",
    ]
    main(["fit", "-c", str(experiment), *args, f"--trainer.accumulate_grad_batches={accumulate}"])
    rows = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * accumulate
    ends = {row["step"]: row["lr"] for row in rows}  # the rate after each optimizer step: the next step's
    assert [ends[i] for i in (1, 2, 3, 4)] == pytest.approx([1e-2, 1e-2, 0.5e-2, 0.0])


def test_the_same_seed_gives_the_same_losses_and_another_does_not(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    losses = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        out = tmp_path / f"{name}.jsonl"
        recorder = {"class_path": "tests.recorder.LossRecorder", "init_args": {"out": str(out)}}
        more = [f"--data.init_args.seed={seed}", f"--seed_everything={seed}", f"--trainer.callbacks+={json.dumps(recorder)}"]
        main(["fit", "-c", str(experiment), *more])
        losses.append([json.loads(line)["loss"] for line in out.read_text().splitlines()])
    assert losses[0] == losses[1] != losses[2]


def test_each_row_of_the_table_trains_at_its_own_rate(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli = main(["fit", "-c", str(experiment)])
    groups = {g["name"]: g for g in cli.trainer.optimizers[0].param_groups}
    assert {n: g["lr"] for n, g in groups.items()} == {"encoder.projector": 1e-2, "encoder.language": 2e-2, "adapter": 3e-2, "unet": 4e-2}
    assert sum(p.numel() for g in groups.values() for p in g["params"]) == sum(p.numel() for p in cli.model.parameters() if p.requires_grad)


def test_predict_draws_every_held_out_record(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["predict", "-c", str(experiment)])
    folder = tmp_path / "runs" / "tiny" / "version_0" / "predictions"
    rows = [json.loads(line) for line in (folder / "pictures.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all((folder / row["picture"]).is_file() for row in rows)

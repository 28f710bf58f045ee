"""What keeps a step from harming the weights: the check of the loss, and clipped gradients at every precision."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lightning_mmgen import cli


def test_a_loss_that_is_not_a_number_stops_the_training(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    term = "--trainer.callbacks+={class_path: tests.own_terms.Overflow, init_args: {at: 1}}"
    made = cli.main(["-c", str(experiment), term], run=False)
    with pytest.raises(ValueError, match="loss is nan at step 1") as stop:
        made.trainer.fit(made.model, made.datamodule)
    message = cli.one_line(stop.value)
    assert re.search(r"\(terms: diffusion \d\.\d+, overflow nan; rows: (caption|subject)-\d{5}, (caption|subject)-\d{5}\)$", message)
    saved = torch.load("runs/tiny/version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    for name, weight in made.model.trainable().items():
        assert torch.equal(weight, saved["state_dict"][name]) and weight.isfinite().all()


def test_the_command_says_so_in_one_line(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    term = "--trainer.callbacks+={class_path: tests.own_terms.Overflow, init_args: {at: 0}}"
    monkeypatch.setattr("sys.argv", ["lightning", "fit", "-c", str(experiment), term])
    assert cli.command() == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: loss is nan at step 0 (terms: diffusion ")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped(precision: str, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = [f"--trainer.precision={precision}", "--trainer.gradient_clip_val=1.0e-3", "--trainer.max_steps=1"]
    module = cli.main(["fit", "-c", str(experiment), *args]).model
    norm = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)

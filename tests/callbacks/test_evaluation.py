"""Looking at the model while it trains: no trace in the training, one look a step."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning_mmgen.callbacks import EMA, FollowingEvaluation, PictureGrid, evaluation, held_out
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_mmgen.cli import main

from ..conftest import DROPOUT_ROWS

LOOKS = [
    {"class_path": "FollowingEvaluation", "init_args": {"every": 1, "count": 2}},
    {"class_path": "PictureGrid", "init_args": {"every": 1, "count": 2}},
]


def fit(
    experiment: Path, name: str, callbacks: list[dict[str, Any]], rows: list[dict[str, Any]], *args: str
) -> tuple[LightningCLI, list[str]]:
    """Three steps with an average; the run, and its losses to the last bit."""
    out = Path(f"{name}.jsonl")
    recorder = {"class_path": "tests.recorder.LossRecorder", "init_args": {"out": str(out)}}
    ema = {"class_path": "EMA", "init_args": {"decay": 0.9}}
    added = (f"--trainer.callbacks+={json.dumps(c)}" for c in (ema, recorder, *callbacks))
    model = (f"--model.init_args.parameters={json.dumps(rows)}", f"--trainer.logger.init_args.name={name}", "--trainer.max_steps=3")
    cli = main(["fit", "-c", str(experiment), *model, *added, *args])
    return cli, [json.loads(line)["loss"] for line in out.read_text().splitlines()]


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for pictures of 64 px, as the oracle reads them; the UNet's own are smaller."""
    monkeypatch.chdir(tmp_path)
    return ["--data.init_args.target_size=64"]


def scalars(run: str, tag: str) -> list[int]:
    """The steps of a scalar on the dashboard."""
    events = EventAccumulator(str(Path("runs") / run / "version_0"))
    events.Reload()
    return [e.step for e in events.Scalars(tag)]


def test_evaluation_leaves_no_trace_in_the_losses(experiment: Path, clip: Path, large: list[str]) -> None:
    score = {"class_path": "CLIPScoreEvaluation", "init_args": {"every": 1, "count": 2, "model": str(clip)}}
    _, plain = fit(experiment, "plain", [], DROPOUT_ROWS, *large)
    cli, looked = fit(experiment, "looked", [*LOOKS, score], DROPOUT_ROWS, *large)
    assert looked == plain and len(plain) == 3
    assert fit(experiment, "still", [], [{**row, "dropout": 0.0} for row in DROPOUT_ROWS], *large)[1] != plain  # dropout was on, then
    for name in ("following", "strict", "consistency", "clip_t"):
        assert scalars("looked", f"held_out/{name}") == [0, 1, 2, 3]
    (following,) = (c for c in cli.trainer.callbacks if isinstance(c, FollowingEvaluation))  # type: ignore[attr-defined]
    assert set(following.before) == set(following.after) and "instruction following" in following.table()


def test_held_out_pictures_have_the_size_of_the_targets(experiment: Path, large: list[str]) -> None:
    cli, _ = fit(experiment, "sizes", LOOKS[1:], DROPOUT_ROWS, *large)
    own = int(cli.model.unet.config.sample_size) * cli.model.codec.factor
    (grid,) = (c for c in cli.trainer.callbacks if isinstance(c, PictureGrid))
    assert own != 64 and grid.before is not None and grid.before.shape == (2, 3, 64, 64)


def test_accumulating_gradients_does_not_look_twice(experiment: Path, large: list[str]) -> None:
    args = ("--trainer.accumulate_grad_batches=2", "--trainer.max_steps=-1", "--trainer.max_epochs=2")
    fit(experiment, "run", LOOKS, DROPOUT_ROWS, *large, *args)
    assert scalars("run", "held_out/following") == [0, 1, 2, 3, 4]
    assert sorted(p.name for p in Path("runs/run/version_0").glob("pictures-*.png")) == [f"pictures-{i:06d}.png" for i in (1, 2, 3, 4)]


def test_a_resumed_run_keeps_what_was_before(experiment: Path, clip: Path, large: list[str]) -> None:
    score = {"class_path": "CLIPScoreEvaluation", "init_args": {"count": 2, "model": str(clip)}}
    first, _ = fit(experiment, "run", [*LOOKS, score], DROPOUT_ROWS, *large, "--trainer.max_steps=2")
    second, _ = fit(experiment, "run", [*LOOKS, score], DROPOUT_ROWS, *large, "--ckpt_path=last")
    before: dict[type, list[Any]] = {
        kind: [c.before for cli in (first, second) for c in cli.trainer.callbacks if isinstance(c, kind)]  # type: ignore[attr-defined]
        for kind in (FollowingEvaluation, PictureGrid)
    }
    assert before[FollowingEvaluation][0] == before[FollowingEvaluation][1] != {}
    assert torch.equal(*before[PictureGrid])
    assert scalars("run", "held_out/clip_t") == [0, 2, 3]


class Small(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(2, 2), nn.Dropout()
        self.dropout.eval()

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())


def draw() -> tuple[float, ...]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


def test_modes_weights_and_generators_are_as_they_were() -> None:
    module, ema = Small(), EMA(0.9)
    weight = module.layer.weight.detach().clone()
    ema.mean = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
    trainer = L.Trainer(accelerator="cpu", callbacks=[ema], logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    expected = draw()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    with evaluation(trainer, module):
        draw()
        assert not any(m.training for m in module.modules()) and not torch.is_grad_enabled()
        assert not module.layer.weight.any()
    assert draw() == expected
    assert module.training and module.layer.training and not module.dropout.training
    with pytest.raises(KeyError), evaluation(trainer, module):
        raise KeyError
    assert module.training and torch.equal(module.layer.weight, weight) and torch.is_grad_enabled()


EDITS = """
data:
  class_path: EditDataModule
  init_args:
    train: {class_path: ToyboxSource, init_args: {tasks: {edit: 1.0}, length: 8}}
    held_out: {class_path: ToyboxSource, init_args: {tasks: {TASK: 1.0}, length: 6, held_out: true}}
    target_size: 64
    batch_size: 2
"""


def test_drift_is_that_of_the_held_out_pictures_outside_their_masks(experiment: Path, tmp_path: Path, large: list[str]) -> None:
    (tmp_path / "edits.yaml").write_text(EDITS.replace("TASK", "edit"))
    drift = {"class_path": "DriftEvaluation", "init_args": {"every": 2, "count": 6}}
    cli, _ = fit(experiment, "drift", [drift], DROPOUT_ROWS, "-c", str(tmp_path / "edits.yaml"))
    assert scalars("drift", "held_out/drift_mse") == [0, 2, 3]
    records, pictures = held_out(cli.trainer, cli.model, 6)
    errors = []
    for record, picture in zip(records, pictures, strict=True):
        keep = 1 - np.asarray(record.mask, np.float64) / 255
        source = np.asarray(record.references[0].image, np.float64) / 255
        drawn = (picture.permute(1, 2, 0).double().numpy() + 1) / 2
        if keep.sum():
            errors.append((((drawn - source) ** 2).mean(-1) * keep).sum() / keep.sum())
    assert 0 < len(errors) < 6  # an edit of the whole picture has nothing outside
    events = EventAccumulator(str(Path("runs") / "drift" / "version_0"))
    events.Reload()
    assert events.Scalars("held_out/drift_mse")[-1].value == pytest.approx(float(np.mean(errors)), rel=1e-4)


def test_drift_without_an_edit_is_refused(experiment: Path, tmp_path: Path, large: list[str]) -> None:
    (tmp_path / "edits.yaml").write_text(EDITS.replace("TASK", "caption"))
    with pytest.raises(ValueError, match="DriftEvaluation: no held-out record is an edit"):
        fit(experiment, "none", [{"class_path": "DriftEvaluation"}], DROPOUT_ROWS, "-c", str(tmp_path / "edits.yaml"))

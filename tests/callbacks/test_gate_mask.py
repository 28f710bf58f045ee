"""What the source gate learns from masks, against a plain cross-entropy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning_mmgen.callbacks import GateMask

from lightning_mmgen.cli import main
from lightning_mmgen.diffusion import ConditionDropout
from lightning_mmgen.losses import DenoisingStep

from ..conftest import logged

ROWS = [
    {"match": "encoder", "train": "frozen"},
    {"match": "adapter", "train": "full", "lr": 1e-2},
    {"match": "unet", "train": "lora", "rank": 2, "lr": 1e-2},
    {"match": "unet.conv_in", "train": "full", "lr": 1e-2},
    {"match": "source_gate", "train": "full", "lr": 1e-1},
]


def fit(experiment: Path, out: Path, steps: int, weight: float = 0.5, gate: bool = True) -> LightningCLI:
    """Some steps on edits and on captions, which have no source."""
    source = {"class_path": "ToyboxSource", "init_args": {"tasks": {"edit": 0.7, "caption": 0.3}, "length": 24}}
    data = ("--data.class_path=EditDataModule", f"--data.init_args.train={json.dumps(source)}", "--data.init_args.batch_size=8")
    model = [f"--model.init_args.parameters={json.dumps(ROWS if gate else ROWS[:-1])}", "--model.init_args.unet.source_latents=true"]
    model += [f"--model.init_args.source_gate={json.dumps(gate)}", f"--trainer.max_steps={steps}"]
    term = json.dumps({"class_path": "GateMask", "init_args": {"weight": weight}})
    return main(["fit", "-c", str(experiment), *data, *model, f"--trainer.callbacks+={term}", f"--trainer.logger.init_args.save_dir={out}"])


def step_of(cli: LightningCLI) -> tuple[GateMask, DenoisingStep]:
    """The term, and what a training step knows; the sources of the first two edits are dropped."""
    term = next(c for c in cli.trainer.callbacks if isinstance(c, GateMask))
    batch, _ = next(iter(cli.datamodule.train_dataloader()))
    edits = torch.nonzero(batch.edit.turn >= 0).flatten()
    shown = batch.edit.shown.clone()
    shown[edits[:2]] = False
    cli.model.condition_dropout = ConditionDropout(0.0)
    return term, cli.model.denoising_step(batch._replace(edit=batch.edit._replace(shown=shown)))


def test_the_term_is_the_cross_entropy_of_the_edits_that_show_their_source(experiment: Path, tmp_path: Path) -> None:
    cli = fit(experiment, tmp_path, 2)
    losses = logged(tmp_path)
    np.testing.assert_allclose(np.add(losses["loss/diffusion"], losses["loss/gate"]), losses["loss"], rtol=1e-5)
    term, step = step_of(cli)
    logits, edit = term.logits, step.batch.edit
    assert logits is not None and edit is not None and (edit.turn < 0).any()
    expected, factor = [], edit.mask.shape[-1] // logits.shape[-1]
    for row in torch.nonzero(edit.shown & (edit.turn >= 0)).flatten().tolist():
        mask = edit.mask[row, 0].unflatten(1, (-1, factor)).unflatten(0, (-1, factor)).amax((1, 3))
        gate = logits[row].sigmoid()
        expected.append(-((1 - mask) * gate.log() + mask * (1 - gate).log()).mean())
    assert 0 < len(expected) < step.batch.size - 2
    loss = term.compute(step)["gate"]
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)
    (slope,) = torch.autograd.grad(loss, logits)  # a step against it closes the gate where the mask is 1, and opens it where it is 0
    counted = slope.abs().amax(dim=(1, 2, 3)) > 0
    assert counted.tolist() == (edit.shown & (edit.turn >= 0)).tolist()
    touched = edit.mask[counted].unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).amax((3, 5)).expand_as(slope[counted])
    assert (slope[counted][touched == 1] > 0).all() and (slope[counted][touched == 0] < 0).all()


def test_a_batch_without_edits_adds_a_zero_of_the_graph(experiment: Path, tmp_path: Path) -> None:
    term, step = step_of(fit(experiment, tmp_path, 1))
    logits = term.logits
    loss = term.compute(step._replace(batch=step.batch._replace(edit=None)))["gate"]
    (slope,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and slope.shape == logits.shape and not slope.any()


def test_it_needs_a_gate_and_a_weight(experiment: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source_gate: true is needed"):
        fit(experiment, tmp_path, 1, gate=False)
    with pytest.raises(ValueError, match="must be above 0, not 0"):
        GateMask(0)

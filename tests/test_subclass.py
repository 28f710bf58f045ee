"""A user's own LightningModule and loss term, started by ``class_path`` alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from lightning_mmgen.cli import main

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(experiment: Path, *args: str) -> LightningCLI:
    return main(["fit", "-c", str(experiment), "--trainer.max_steps=1", *args])


def test_the_readmes_subclass_trains_with_its_own_loss(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(r"```python\n(# own_module\.py.*?)```", README.read_text(), re.DOTALL)
    assert block and len(block[1].splitlines()) <= 15
    Path("own_module.py").write_text(block[1])
    monkeypatch.setattr(sys, "path", [str(Path.cwd()), *sys.path])
    monkeypatch.delitem(sys.modules, "own_module", raising=False)
    cli = fit(experiment, "--model.class_path=own_module.HuberDiffusion", "--model.init_args.huber=0.5")
    logged = cli.trainer.callback_metrics
    assert type(cli.model).__name__ == "HuberDiffusion" and cli.model.huber == 0.5
    assert logged["loss/huber"] > 0
    torch.testing.assert_close(logged["loss"], logged["loss/diffusion"] + logged["loss/huber"])


def test_a_loss_term_is_logged_by_its_name_at_its_weight(experiment: Path) -> None:
    terms, weights = [], []
    for weight in (1.0, 3.0):
        term = f"{{class_path: tests.own_terms.Brightness, init_args: {{weight: {weight}}}}}"
        cli = fit(experiment, f"--trainer.callbacks+={term}")
        logged = cli.trainer.callback_metrics
        torch.testing.assert_close(logged["loss"], logged["loss/diffusion"] + logged["loss/brightness"])
        terms.append(logged["loss/brightness"])
        weights.append(cli.model.adapter.project_out.weight.detach())
    torch.testing.assert_close(terms[1], 3 * terms[0])
    assert terms[0] > 0 and not torch.equal(weights[0], weights[1])

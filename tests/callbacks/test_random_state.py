from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_mmgen.callbacks import RandomState

from lightning_mmgen.cli import main

from ..conftest import DROPOUT_ROWS


def draw() -> list[float]:
    return [float(torch.rand(())), random.gauss(), random.random(), float(np.random.normal()), float(np.random.rand())]


def test_every_generator_of_the_process_goes_on_where_it_was(tmp_path: Path) -> None:
    draw()
    torch.save(RandomState().state_dict(), tmp_path / "state")
    expected, resumed = [draw() for _ in range(3)], RandomState()
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    other: Any = None  # the hook looks at neither trainer nor module
    resumed.on_train_batch_start(other, other, None, 0)
    assert draw() == expected[0]
    resumed.on_train_batch_start(other, other, None, 1)  # the first batch only
    assert [draw(), draw()] == expected[1:]


def losses(experiment: Path, name: str, *args: str) -> dict[int, str]:
    """The losses of a run with dropout, by step; an epoch has four."""
    out = Path(f"{name}.jsonl")
    recorder = {"class_path": "tests.recorder.LossRecorder", "init_args": {"out": str(out)}}
    settings = [f"--model.init_args.parameters={json.dumps(DROPOUT_ROWS)}", f"--trainer.logger.init_args.name={name}"]
    main(["fit", "-c", str(experiment), *settings, f"--trainer.callbacks+={json.dumps(recorder)}", *args])
    return {row["step"]: row["loss"] for row in map(json.loads, out.read_text().splitlines())}


@pytest.mark.parametrize("stop", [3, 4], ids=["within an epoch", "at its end"])
def test_dropout_goes_on_after_a_resume(stop: int, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = losses(experiment, "whole", "--trainer.max_steps=6")
    losses(experiment, "parts", f"--trainer.max_steps={stop}")
    assert losses(experiment, "parts", "--trainer.max_steps=6", "--ckpt_path=last") == whole

"""``kill -9`` at a step, then the same command with ``--ckpt_path last``: what follows is equal to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


def fit(folder: Path, losses: Path, *more: str, kill_at: int | None = None) -> int:
    recorder = {"class_path": "tests.recorder.LossRecorder", "init_args": {"out": str(losses), "kill_at": kill_at}}
    command = [sys.executable, "-m", "lightning_mmgen", "fit", "-c", "experiments/instruct.yaml", "-c", str(folder / "small.yaml")]
    command += [f"--trainer.callbacks+={json.dumps(recorder)}", f"--trainer.logger.init_args.save_dir={folder / 'runs'}", *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert kill_at or done.returncode == 0, done.stderr[-2000:]
    return done.returncode


def rows(path: Path) -> dict[int, Any]:
    return {row["step"]: row for row in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text("""
model:
  class_path: MultimodalDiffusion
  init_args:
    parameters:
      - {match: encoder.vision, train: frozen}
      - {match: encoder.projector, train: lora, rank: 2, lr: 1.0e-3, dropout: 0.2}
      - {match: encoder.language, train: lora, rank: 2, lr: 1.0e-3, dropout: 0.2}
      - {match: adapter, train: full, lr: 1.0e-3}
      - {match: unet, train: lora, rank: 2, lr: 2.0e-3, dropout: 0.2}
data:
  class_path: MultimodalDataModule
  init_args: {batch_size: 2, workers: 2, train: {class_path: ToyboxSource, init_args: {tasks: {subject: 0.5, caption: 0.5}, length: 10}}}
trainer:
  max_steps: 12
  enable_progress_bar: false
  callbacks:
    - {class_path: EMA, init_args: {decay: 0.9}}
    - {class_path: ModelCheckpoint, init_args: {every_n_train_steps: 2, save_last: true, enable_version_counter: false}}
""")
    return tmp_path


def test_a_killed_run_goes_on_bit_equal(small: Path) -> None:
    whole, killed = small / "whole.jsonl", small / "killed.jsonl"
    fit(small, whole, "--trainer.logger.init_args.name=whole")
    assert fit(small, killed, "--trainer.logger.init_args.name=killed", kill_at=7) == -9  # the middle of the second epoch of 5 batches
    before = rows(killed)
    assert sorted(before) == list(range(1, 8))
    fit(small, killed, "--trainer.logger.init_args.name=killed", "--ckpt_path=last")
    assert rows(killed) == rows(whole)
    assert len(rows(whole)) == 12

    a, b = (torch.load(small / "runs" / n / "version_0/checkpoints/last.ckpt", weights_only=True) for n in ("whole", "killed"))
    assert a["global_step"] == b["global_step"] == 12
    for key in a["state_dict"]:
        assert torch.equal(a["state_dict"][key], b["state_dict"][key]), key
    ema = next(k for k in a["callbacks"] if k.startswith("EMA"))
    for key, value in a["callbacks"][ema]["mean"].items():
        assert torch.equal(value, b["callbacks"][ema]["mean"][key]), key
    assert all("lora_" in k or k.startswith("adapter.") for k in a["state_dict"]), "a checkpoint holds what is trained, nothing else"


def test_the_last_checkpoint_is_of_the_last_step_and_goes_on_bit_equal(small: Path) -> None:
    """Lightning's own ``ModelCheckpoint`` writes nothing at the end: ``last.ckpt`` would be of step 4, and 5 to 7 be lost."""
    whole, parts = small / "whole.jsonl", small / "parts.jsonl"
    (small / "small.yaml").write_text((small / "small.yaml").read_text().replace("every_n_train_steps: 2", "every_n_train_steps: 4"))
    constant = "--model.init_args.schedule.decay=constant"
    fit(small, whole, "--trainer.logger.init_args.name=whole", constant, "--trainer.max_steps=9")
    fit(small, parts, "--trainer.logger.init_args.name=parts", constant, "--trainer.max_steps=7")
    last = small / "runs/parts/version_0/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 7
    fit(small, parts, "--trainer.logger.init_args.name=parts", constant, "--trainer.max_steps=9", "--ckpt_path=last")
    assert rows(parts) == rows(whole)
    assert sorted(rows(whole)) == list(range(1, 10))

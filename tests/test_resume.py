"""``kill -9`` at a step, then the same command with ``--ckpt_path last``: what follows is equal to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .engines import ROOT, Run, checkpoint, fit, seen, written

SMALL = """
model:
  class_path: MultimodalDiffusion
  init_args:
    start: null
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
"""
"""Dropout on, two data workers, 5 batches to an epoch."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``killed`` dies after step 7, in the middle of the second epoch, and goes on; ``parts`` ends at step 7, and goes on to 9."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "engines.yaml").write_text((ROOT / "experiments/instruct.yaml").read_text())
    (folder / "small.yaml").write_text(SMALL)
    (folder / "rarely.yaml").write_text(SMALL.replace("every_n_train_steps: 2", "every_n_train_steps: 4"))
    often, rarely = (("-c", str(folder / name)) for name in ("small.yaml", "rarely.yaml"))
    rarely = (*rarely, "--model.init_args.schedule.decay=constant")
    fit(
        folder,
        Run("whole", more=often),
        Run("killed", more=often, status=-9, kill_at=7),
        Run("killed", more=(*often, "--ckpt_path=last")),
        Run("all", more=(*rarely, "--trainer.max_steps=9")),
        Run("parts", more=(*rarely, "--trainer.max_steps=7")),
        Run("parts", more=(*rarely, "--trainer.max_steps=9", "--ckpt_path=last")),
    )
    return folder


def losses(folder: Path, name: str) -> list[tuple[int, float, list[str], dict[str, float]]]:
    return [(row["batch"], row["loss"], row["ids"], row["lr"]) for row in seen(folder, name)]


def test_a_killed_run_goes_on_bit_equal(folder: Path) -> None:
    assert [row["batch"] for row in written(folder, "killed")] == [*range(1, 8), *range(7, 13)], "the checkpoint was that of step 6"
    assert losses(folder, "killed") == losses(folder, "whole")
    assert [batch for batch, *_ in losses(folder, "whole")] == list(range(1, 13))

    a, b = (checkpoint(folder, name) for name in ("whole", "killed"))
    assert a["global_step"] == b["global_step"] == 12
    for key in a["state_dict"]:
        assert torch.equal(a["state_dict"][key], b["state_dict"][key]), key
    ema = next(k for k in a["callbacks"] if k.startswith("EMA"))
    for key, value in a["callbacks"][ema]["mean"].items():
        assert torch.equal(value, b["callbacks"][ema]["mean"][key]), key
    assert all("lora_" in k or k.startswith("adapter.") for k in a["state_dict"]), "a checkpoint holds what is trained, nothing else"


def test_the_last_checkpoint_is_of_the_last_step_and_goes_on_bit_equal(folder: Path) -> None:
    """Lightning's own ``ModelCheckpoint`` writes nothing at the end: ``last.ckpt`` would be of step 4, and 5 to 7 be lost."""
    assert [row["batch"] for row in written(folder, "parts")] == list(range(1, 10)), "it went on from step 7"
    assert losses(folder, "parts") == losses(folder, "all")

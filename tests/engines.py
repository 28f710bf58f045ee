"""Runs of the tiny experiment in one process and in two, for tests and benchmarks of strategies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
ENGINES = ("ddp", "fsdp", "deepspeed_zero2", "deepspeed_zero3")


def fit(
    folder: Path,
    name: str,
    *more: str,
    engine: str | None = None,
    status: int | None = 0,
    kill_at: int | None = None,
    term_at: int | None = None,
) -> str:
    """``lightning fit`` of ``folder``'s YAML in two processes, or in one if no engine is given; its run is ``folder/runs/name``, and what
    rank r saw lies in ``name.r.jsonl``. Returns what it printed."""
    recorder = {
        "class_path": "tests.recorder.RankRecorder",
        "init_args": {"out": str(folder / name), "kill_at": kill_at, "term_at": term_at},
    }
    command = [sys.executable, "-m", "lightning_mmgen", "fit", "-c", str(folder / "engines.yaml")]
    if engine:
        command += ["-c", f"experiments/overlays/{engine}.yaml", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    command += [f"--trainer.callbacks+={json.dumps(recorder)}", f"--trainer.logger.init_args.save_dir={folder / 'runs'}"]
    command += [f"--trainer.logger.init_args.name={name}", *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MMGEN_ALLOW": "tests"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=env)
    assert status is None or done.returncode == status, done.stderr[-3000:]
    return done.stdout + done.stderr


def seen(folder: Path, name: str, rank: int = 0) -> list[dict[str, Any]]:
    """What a rank saw, a row a batch; a run that went on counts once."""
    rows = [json.loads(line) for line in (folder / f"{name}.{rank}.jsonl").read_text().splitlines()]
    return list({row["batch"]: row for row in rows}.values())


def losses(folder: Path, name: str, world: int = 1) -> list[float]:
    """The loss of each global batch."""
    return [sum(row["loss"] for row in rows) / world for rows in zip(*(seen(folder, name, r) for r in range(world)), strict=True)]


def checkpoint(folder: Path, name: str, file: str = "last.ckpt") -> dict[str, Any]:
    """A checkpoint of a run."""
    return torch.load(folder / f"runs/{name}/version_0/checkpoints/{file}", weights_only=True)  # type: ignore[no-any-return]


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Between two sets of tensors of the same names."""
    assert a.keys() == b.keys()
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in a)


YAML = """
seed_everything: 7
model:
  class_path: MultimodalDiffusion
  init_args:
    encoder: {{class_path: Idefics2Encoder, init_args: {{pretrained: {parts}/vlm, image_tokens: 16}}}}
    adapter: {{layers: 2, heads: 2, width: 8}}
    unet: {{pretrained: {parts}/unet, subfolder: null}}
    codec: {{pretrained: {parts}/vae, subfolder: null}}
    sampler: {{steps: 2, guidance_scale: 2.0}}
    schedule: {{warmup: 2, decay: cosine}}
    parameters:
      - {{match: encoder.vision, train: frozen}}
      - {{match: encoder.projector, train: lora, rank: 2, lr: 1.0e-3}}
      - {{match: encoder.language, train: lora, rank: 2, lr: 2.0e-3}}
      - {{match: adapter, train: full, lr: 3.0e-3}}
      - {{match: unet, train: lora, rank: 2, lr: 4.0e-3}}
data:
  class_path: EditDataModule
  init_args:
    train: {{class_path: ToyboxSource, init_args: {{tasks: {{edit turn: 1.0}}, length: 20}}}}
    held_out: {{class_path: ToyboxSource, init_args: {{tasks: {{subject: 1.0}}, length: 4, held_out: true}}}}
    target_size: 16
    batch_size: 2
trainer:
  max_steps: 4
  accumulate_grad_batches: 2
  gradient_clip_val: 0.1
  accelerator: cpu
  limit_val_batches: 0
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  enable_progress_bar: false
  logger: {{class_path: TensorBoardLogger, init_args: {{save_dir: runs, name: engines}}}}
  callbacks:
    - {{class_path: EMA, init_args: {{decay: 0.9}}}}
    - {{class_path: ConsistencyPenalty, init_args: {{spatial: 1.0, temporal: 0.5}}}}
    - {{class_path: PictureGrid, init_args: {{count: 2, every: 2}}}}
    - {{class_path: CLIPScoreEvaluation, init_args: {{count: 4, every: 2, model: {clip}}}}}
    - class_path: ModelCheckpoint
      init_args: {{every_n_train_steps: 2, save_last: true, save_top_k: -1, enable_version_counter: false, filename: "{{step}}"}}
"""
"""Four learning rates, LoRA beside a full adapter, clipping, accumulation, a term of the loss that asks the averaged weights, an average,
and all that looks at pictures."""

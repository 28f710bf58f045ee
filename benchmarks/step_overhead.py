"""A training step through the framework against a plain PyTorch loop of the same work, alternating in one process.

    OMP_NUM_THREADS=2 python benchmarks/step_overhead.py [--pairs 40]

Both loops draw the same batches of 8 from the same data module, and run the same encoder, adapter, UNet, codec, loss, clipping and
optimizer. The framework's step is what ``trainer.fit`` does between two batches, its logger and progress bar included; a callback hands
the turn to the plain loop after every step. Prints the median of the pairwise ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lightning_mmgen.cli import main as lightning
from lightning_mmgen.diffusion import drop_condition
from lightning_mmgen.models.unet import denoise
from lightning_mmgen.module import SampleNoise
from lightning_mmgen.optimizer import make_optimizer

ROOT = Path(__file__).resolve().parent.parent


class PlainLoop:
    """The same work without Lightning."""

    def __init__(self, module: Any, loader: Any) -> None:
        self.module, self.batches = module, iter(loader)
        self.weights = list(module.trainable().values())
        self.optimizer = make_optimizer(module.table.groups(), module.betas, fused=True)

    def step(self) -> None:
        """Fetch a batch, one optimizer step."""
        m = self.module
        batch, _ = next(self.batches)
        height, width = batch.target.shape[-2:]
        draw = SampleNoise(batch.seed, (m.codec.channels, height // m.codec.factor, width // m.codec.factor), m.diffusion)
        batch = drop_condition(batch, m.condition_dropout, draw.dropout)
        z0 = m.codec.encode(batch.target, draw.posterior)
        z_t = m.diffusion.add_noise(z0, draw.noise, draw.timesteps)
        condition = m.adapter(m.encoder(batch.instructions, batch.markers, batch.references))
        prediction = denoise(m.unet, z_t, draw.timesteps, condition, (height, width))
        loss = (prediction - m.diffusion.target(z0, draw.noise, draw.timesteps)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()


class Alternate(Callback):
    """Times the framework's step (from the end of the plain one to the end of its own) and the plain one in turn."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.plain, self.mark = warmup, None, 0.0
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        data = trainer.datamodule
        self.plain = PlainLoop(pl_module, data._loader(data.rows(), data._sampler))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        now = time.perf_counter()
        if self.mark:
            self.ours.append(now - self.mark)
        start = time.perf_counter()
        assert self.plain is not None
        self.plain.step()
        if self.mark:
            self.theirs.append(time.perf_counter() - start)
        self.mark = time.perf_counter()


def compare(name: str, ours: list[float], other: str, theirs: list[float], of: str = "step") -> None:
    """Print the medians of two series of seconds, and the median and quartiles of their pairwise ratios."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"{name} {statistics.median(ours) * 1e3:.1f} ms, {other} {statistics.median(theirs) * 1e3:.1f} ms a {of}, {len(ratios)} pairs")
    print(f"ratio: median {statistics.median(ratios):.3f}, quartiles {ratios[len(ratios) // 4]:.3f} to {ratios[3 * len(ratios) // 4]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=40)
    args = parser.parse_args()
    experiment = ["-c", str(ROOT / "experiments/instruct.yaml"), f"--trainer.max_steps={args.pairs + 4}", "--data.init_args.batch_size=8"]
    cli = lightning([*experiment, "--trainer.callbacks=null"], run=False)
    alternate = Alternate(warmup=3)
    cli.trainer.callbacks.append(alternate)
    cli.trainer.fit(cli.model, cli.datamodule)
    compare("framework", alternate.ours[3:], "plain", alternate.theirs[3:])


if __name__ == "__main__":
    main()

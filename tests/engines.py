"""Runs of the tiny experiment in one process and in two, for tests and benchmarks of strategies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_mmgen.checkpoint import AtomicCheckpointIO

ROOT = Path(__file__).parent.parent
ENGINES = ("ddp", "fsdp", "deepspeed_zero2", "deepspeed_zero3")


class Run(NamedTuple):
    """A run of ``folder``'s YAML: in one process if no engine is given, else in two. It is ``folder/runs/name``, and what rank r saw lies
    in ``name.r.jsonl``.

    Attributes:
        more: arguments of its own.
        status: in which it ends, or that of each rank.
        kill_at, rank, term_at: of :class:`~tests.recorder.RankRecorder`.
    """

    name: str
    engine: str | None = None
    more: tuple[str, ...] = ()
    status: int | tuple[int, ...] = 0
    kill_at: int | None = None
    rank: int | None = None
    term_at: int | None = None

    @property
    def statuses(self) -> list[int]:
        """Of each rank."""
        return [self.status] * (2 if self.engine else 1) if isinstance(self.status, int) else list(self.status)

    def command(self, folder: Path) -> list[str]:
        """Arguments of ``lightning``."""
        own = {"out": str(folder / self.name), "kill_at": self.kill_at, "rank": self.rank, "term_at": self.term_at}
        recorder = {"class_path": "tests.recorder.RankRecorder", "init_args": own}
        args = ["fit", "-c", str(folder / "engines.yaml")]
        if self.engine:
            args += ["-c", f"experiments/overlays/{self.engine}.yaml", "--trainer.devices=2", "--trainer.accelerator=cpu"]
        args += [*self.more, f"--trainer.callbacks+={json.dumps(recorder)}", f"--trainer.logger.init_args.save_dir={folder / 'runs'}"]
        return [*args, f"--trainer.logger.init_args.name={self.name}"]


def reference(clip: Path) -> str:
    """The argument that adds the evaluation of references, which costs more than the others."""
    own = {"count": 2, "clip": str(clip), "probes": 1, "hiding": "swap"}
    return f"--trainer.callbacks+={json.dumps({'class_path': 'ReferenceEvaluation', 'init_args': own})}"


def fit(folder: Path, *runs: Run) -> None:
    """``lightning fit`` of these runs, one after the other, in one subprocess that imports once and forks. There is no compiler."""
    command = [sys.executable, "-m", "tests.engines", str(folder), json.dumps(runs)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MMGEN_ALLOW": "tests", "DS_ACCELERATOR": "cpu"}
    env["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # what is let go leaves the process, and no holes
    env |= {"CC": "/bin/false", "CXX": "/bin/false", "TORCH_EXTENSIONS_DIR": str(folder / "compiled")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=env)
    (folder / "times.log").write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def main() -> None:
    """What :func:`fit` starts."""
    import deepspeed  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401
    from lightning.fabric.plugins.environments.lightning import find_free_network_port

    from lightning_mmgen import cli

    folder = Path(sys.argv[1])
    for run in (Run(*row) for row in json.loads(sys.argv[2])):
        sys.argv = ["lightning", *run.command(folder)]
        os.environ["MMGEN_PORT"] = str(find_free_network_port())
        began = os.times()
        if run.statuses == [0]:  # the others begin with what it has imported
            statuses = [cli.command()]
        else:
            logs = [folder / f"{run.name}.{rank}.log" for rank in range(len(run.statuses))]
            statuses = _ended(
                [_fork(cli.command, rank, log) for rank, log in enumerate(logs)], together=run.rank is None and run.status != 1
            )
        ended = os.times()
        print(f"{run.name}: {ended.elapsed - began.elapsed:.1f} s, {ended[2] + ended[3] - began[2] - began[3]:.1f} s of CPU", flush=True)
        if statuses != run.statuses:
            log = (folder / f"{run.name}.0.log").read_text() if run.engine else ""
            sys.exit(f"{run.name}: {statuses}, not {run.statuses}\n{log[-3000:]}")


def _fork(work: Callable[[], int], rank: int, log: Path) -> int:
    """A process of a group, as torchrun would start it; its output goes to ``log``."""
    if pid := os.fork():
        return pid
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ["MMGEN_PORT"]}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = 1
    try:
        status = work()
    except SystemExit as stop:
        status = int(stop.code or 0)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def aligned(text: str) -> str:
    """The YAML with an Aligner, at a rate of its own, and the term of the loss that it is of."""
    term = "{class_path: AttentionAlignment, init_args: {target: vlm, weight: 1.0, aligner: {variant: light, width: 4}}}"
    text = text.replace("data:\n", "      - {match: aligner, train: full, lr: 5.0e-3}\ndata:\n", 1)
    return text.replace("  callbacks:\n", f"  callbacks:\n    - {term}\n", 1)


def bare(text: str) -> str:
    """The YAML without evaluations, checkpoints and accumulation."""
    text = text[: text.index("  callbacks:")].replace("accumulate_grad_batches: 2", "accumulate_grad_batches: 1")
    return text + "  enable_checkpointing: false\n  callbacks: []\n"


def _ended(pids: list[int], together: bool, seconds: float = 400) -> list[int]:
    """The statuses of processes, which live and die together where nothing else is said, and in any case after ``seconds``."""
    statuses: dict[int, int] = {}
    end = time.monotonic() + seconds
    while left := [pid for pid in pids if pid not in statuses]:
        fallen = together and any(status not in (0, 143) for status in statuses.values())  # at 143 they stop by themselves
        for pid in left:
            if fallen or time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [statuses[pid] for pid in pids]


def written(folder: Path, name: str, rank: int = 0) -> list[dict[str, Any]]:
    """What a rank saw, a row a batch, as often as it did."""
    return [json.loads(line) for line in (folder / f"{name}.{rank}.jsonl").read_text().splitlines()]


def seen(folder: Path, name: str, rank: int = 0) -> list[dict[str, Any]]:
    """The same, each batch of a run that went on once."""
    return list({row["batch"]: row for row in written(folder, name, rank)}.values())


def losses(folder: Path, name: str, world: int = 1) -> list[float]:
    """The loss of each global batch."""
    return [sum(row["loss"] for row in rows) / world for rows in zip(*(seen(folder, name, r) for r in range(world)), strict=True)]


def checkpoint(folder: Path, name: str, file: str = "last.ckpt") -> dict[str, Any]:
    """A checkpoint of a run."""
    return AtomicCheckpointIO().load_checkpoint(folder / f"runs/{name}/version_0/checkpoints/{file}")


def held(folder: Path, name: str) -> list[int]:
    """The bytes of float32 tensors in each file of a run's last checkpoint, those of its pieces last."""
    place = folder / f"runs/{name}/version_0/checkpoints"
    files = [place / "last.ckpt", *place.glob("last.ckpt.pieces/*/*")]
    return [sum(floats(torch.load(path, weights_only=True))) for path in files]


def floats(value: Any) -> Iterator[int]:
    """The bytes of each float32 tensor of a checkpoint, with what lies behind it in memory."""
    if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
        yield value.untyped_storage().nbytes()
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from floats(inner)


FORGOTTEN = ("blocks.0.bias", "blocks.3.bias", "out.bias")
"""Of an Aligner: its norms, and maps that are brought to [0, 1], forget a constant, so that their gradients are what rounding leaves."""


def largest_difference(a: dict[Any, Any], b: dict[Any, Any]) -> float:
    """Between two sets of tensors of the same names."""
    assert a.keys() == b.keys()
    names = [k for k in a if not (str(k).startswith("aligner.") and str(k).endswith(FORGOTTEN))]
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in names)


YAML = """
seed_everything: 7
model:
  class_path: MultimodalDiffusion
  init_args:
    encoder: {{class_path: Idefics2Encoder, init_args: {{pretrained: {parts}/vlm, image_tokens: 16}}}}
    adapter: {{layers: 2, heads: 2, width: 8}}
    unet: {{pretrained: {parts}/unet, subfolder: null}}
    codec: {{pretrained: {parts}/vae, subfolder: null}}
    sampler: {{steps: 1}}
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
    held_out: {{class_path: ToyboxSource, init_args: {{tasks: {{subject: 1.0}}, length: 2, held_out: true}}}}
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
    - {{class_path: CaptionTeacher, init_args: {{details: 2.0}}}}
    - {{class_path: PictureGrid, init_args: {{every: 2, count: 2}}}}
    - {{class_path: CLIPScoreEvaluation, init_args: {{every: 2, count: 2, model: {clip}}}}}
    - class_path: ModelCheckpoint
      init_args: {{every_n_train_steps: 2, save_last: true, save_top_k: -1, enable_version_counter: false, filename: "{{step}}"}}
"""
"""Four learning rates, LoRA beside a full adapter, clipping, accumulation, terms of the loss that ask the averaged weights and the first
ones, an average, and all that looks at pictures."""

PLAIN = """
trainer:
  callbacks:
    - {class_path: EMA, init_args: {decay: 0.9}}
    - class_path: ModelCheckpoint
      init_args: {every_n_train_steps: 2, save_last: true, save_top_k: -1, enable_version_counter: false, filename: "{step}"}
"""
"""The same without looking at pictures."""

GATED = """
model:
  class_path: MultimodalDiffusion
  init_args:
    unet: {source_latents: true}
    source_gate: true
    parameters:
      - {match: encoder, train: frozen}
      - {match: adapter, train: full, lr: 3.0e-3}
      - {match: unet, train: lora, rank: 2, lr: 4.0e-3}
      - {match: unet.conv_in, train: full, lr: 1.0e-3}
      - {match: source_gate, train: full, lr: 1.0e-2}
data:
  class_path: EditDataModule
  init_args:
    train: {class_path: ToyboxSource, init_args: {tasks: {edit turn: 0.4, caption: 0.6}, length: 20}}
trainer:
  callbacks:
    - {class_path: EMA, init_args: {decay: 0.9}}
    - {class_path: GateMask, init_args: {weight: 0.5}}
    - {class_path: ConsistencyPenalty, init_args: {spatial: 1.0, turns: 0.5, pixels: 0.2}}
    - {class_path: ModelCheckpoint, init_args: {every_n_train_steps: 2, save_last: true, enable_version_counter: false}}
"""
"""The same with sources and a gate, over edits and captions: a process's two samples may both have no source."""

if __name__ == "__main__":
    main()

"""What reproduces a run, in its folder; the parameter table on the screen and on the dashboard; where things are, at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_mmgen.data.sources import Source
from lightning_mmgen.data.streams import Stream
from lightning_mmgen.folder import run_folder
from lightning_mmgen.ranks import of_all_ranks
from lightning_mmgen.tools.runs import flat

from .loggers import log_text
from .picture_grid import PictureGrid
from .scoring import Evaluation

PACKAGES = ("lightning_mmgen", "torch", "lightning", "diffusers", "transformers", "peft", "torchmetrics", "omegaconf", "jsonargparse")


class RunCard(Callback):
    """Writes ``run.json`` (command, versions, git revision, data fingerprint, seed) and the parameter table; the ``lightning`` command
    adds it to every fit and test, and the resolved configuration as ``config.yaml`` beside it, its model alone as ``model.yaml`` (what
    ``lightning test --model`` takes).

    Args:
        config: the resolved configuration, as YAML.
        seed: of the run.
    """

    def __init__(self, config: str = "", seed: int | None = None) -> None:
        self.config, self.seed = config, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises: ValueError: a rank has another configuration than the first; on all ranks, before anything is built."""
        run_folder(trainer)
        texts = of_all_ranks(self.config)
        if odd := next((rank for rank, text in enumerate(texts) if text != texts[0]), None):
            first, other = (flat(yaml.safe_load(texts[rank])) for rank in (0, odd))
            key = next(key for key in first | other if first.get(key) != other.get(key))
            raise ValueError(f"rank {odd} has another configuration than rank 0: {key} is {other.get(key)}, not {first.get(key)}")

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        table = getattr(pl_module, "table", None)  # a module of another kind has none
        if table is not None:
            print(f"\n{table}\n", flush=True)
        folder = run_folder(trainer)
        if folder is None:
            return
        self._write(trainer, folder, table)
        if table is not None:
            log_text(trainer, "parameters", table.markdown())
        log_text(trainer, "config", "    " + self.config.replace("\n", "\n    "))

    @rank_zero_only
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)
        if folder is not None and not (folder / "config.yaml").is_file():  # a test in a fit's folder leaves it its own
            self._write(trainer, folder, getattr(pl_module, "table", None))

    def _write(self, trainer: Trainer, folder: Path, table: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(self.config)
        (folder / "model.yaml").write_text(yaml.safe_dump((yaml.safe_load(self.config) or {}).get("model"), sort_keys=False))
        if table is not None:
            (folder / "parameters.txt").write_text(f"{table}\n")
        (folder / "run.json").write_text(json.dumps(self.facts(trainer), indent=2) + "\n")

    def facts(self, trainer: Trainer) -> dict[str, Any]:
        """Plain values that name the code, the data and the command."""
        source = getattr(trainer.datamodule, "train", None)  # type: ignore[attr-defined]
        return {
            "command": sys.argv,
            "seed": self.seed,
            "python": sys.version.split()[0],
            "packages": {name: version(name) for name in PACKAGES},
            "revision": revision(),
            "data": source.fingerprint() if isinstance(source, (Source, Stream)) else None,
        }

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        lines = tables(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.last_model_path:
                lines.append(f"checkpoint  {callback.last_model_path}")
            if isinstance(callback, PictureGrid) and callback.path:
                lines.append(f"pictures    {callback.path}")
        if isinstance(trainer.logger, TensorBoardLogger):
            lines.append(f"dashboard   tensorboard --logdir {trainer.logger.save_dir}")
        print("\n" + "\n".join(lines), flush=True)

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        print("\n" + "\n".join(tables(trainer)), flush=True)


def tables(trainer: Trainer) -> list[str]:
    """What the evaluations of a run found, a table each."""
    return [table for c in trainer.callbacks if isinstance(c, Evaluation) and (table := c.table())]  # type: ignore[attr-defined]


def revision() -> str | None:
    """The git revision of the working directory, with ``+changes`` where files differ from it; None outside of git."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changed else "")

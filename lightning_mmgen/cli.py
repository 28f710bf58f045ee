"""The ``lightning`` command: an experiment's YAML, made into model, data and trainer by LightningCLI."""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO

import lightning_mmgen.callbacks as callbacks

from .answering import VisualInstructionTuning
from .checkpoint import AtomicCheckpointIO
from .data.crops import CropDataModule
from .data.datamodule import MultimodalDataModule
from .data.edits import EditDataModule
from .data.instructions import InstructionDataModule
from .data.pairs import PairedDataModule
from .data.questions import VQADataModule
from .data.retrieval import RetrievalDataModule
from .data.shards import WebDatasetSource, WebDatasetStream
from .data.sources import DatasetSource, JSONLSource, ToyboxSource
from .data.streams import DatasetStream
from .data.suites import DreamBenchSource, PartiPromptsSource, SuiteDataModule
from .models.encoder import encoders
from .module import MultimodalDiffusion
from .strategies import FSDP2, ZeRO
from .tuning import TunedModule

SHORT_NAMES = (
    *encoders(),
    JSONLSource,
    DatasetSource,
    ToyboxSource,
    WebDatasetSource,
    WebDatasetStream,
    DatasetStream,
    CropDataModule,
    EditDataModule,
    RetrievalDataModule,
    InstructionDataModule,
    DreamBenchSource,
    PartiPromptsSource,
    PairedDataModule,
    SuiteDataModule,
    MultimodalDataModule,
    MultimodalDiffusion,
    VisualInstructionTuning,
    VQADataModule,
    FSDP2,
    ZeRO,
)  # imported: class_path may be the bare name
ALLOWED = ["lightning_mmgen", "lightning", "torch"]  # what a YAML may import, beside the working directory's own modules


class CLI(LightningCLI):
    """LightningCLI with this framework's defaults: its module unless a ``class_path`` names another, checkpoints that
    survive a kill, a run folder that reproduces the run."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"model": {"class_path": _path(MultimodalDiffusion)}})

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.get("ckpt_path") == "last" and (logger := config.trainer.get("logger")):
            settings = logger.init_args
            if folder := last_run(Path(settings.save_dir), settings.get("name") or ""):
                settings.version = folder.name  # the run goes on in its own folder
                config.ckpt_path = str(folder / "checkpoints" / "last.ckpt")
            else:
                print(
                    f"--ckpt_path last: no checkpoint under {settings.save_dir}/{settings.get('name') or ''}; starting anew",
                    file=sys.stderr,
                )
                config.ckpt_path = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        config = self.config[self.subcommand] if self.subcommand else self.config
        text = self._parser(self.subcommand).dump(config, skip_none=False)
        own: list[Callback] = [callbacks.RandomState(), callbacks.LastCheckpoint(), callbacks.PictureWriter()]
        own.append(callbacks.RunCard(text, config.get("seed_everything")))
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # nobody chose another
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        first: list[Callback] = []
        if trainer.loggers:
            own += [LearningRateMonitor("step"), callbacks.GradientNorm(), callbacks.Dashboard(), callbacks.ModelCard()]
            first.append(callbacks.Throughput())
            if not any(isinstance(c, callbacks.TimestepLoss) for c in trainer.callbacks):  # type: ignore[attr-defined]
                own.append(callbacks.TimestepLoss())
        own.append(callbacks.Preemption())  # after what else ends a step
        trainer.callbacks = trainer._callback_connector._reorder_callbacks(first + trainer.callbacks + own)  # type: ignore[attr-defined]
        return trainer


def last_run(save_dir: Path, name: str) -> Path | None:
    """The newest ``version_k`` folder with a checkpoint in it."""
    found = [p.parent.parent for p in (save_dir / name).glob("version_*/checkpoints/last.ckpt")]
    return max(found, key=lambda p: int(p.name.removeprefix("version_")), default=None)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def own_modules(folder: Path) -> list[str]:
    """Names of the modules and packages of a folder: a user's own classes."""
    return sorted({p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/__init__.py")})


WRAPPING = re.compile(
    r"(Given value|Subtypes:|Errors:|Does not validate|Expected a <class|Expected a path but|Problem with given class_path)"
)


def one_line(error: BaseException) -> str:
    """The message of an error without what parsers wrap around it: the key, and what is wrong there."""
    lines = [line.strip(" -") for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()]
    telling = list(dict.fromkeys(line for line in lines if line and not WRAPPING.match(line)))
    return " ".join(telling)[:400] or type(error).__name__


def read_model(config: Path) -> TunedModule:
    """The unbuilt module of a run's resolved ``config.yaml``."""
    import yaml

    _trust_here()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TunedModule, "model", required=True)
    model = parser.parse_object({"model": yaml.safe_load(config.read_text())["model"]})
    return parser.instantiate(model).model  # type: ignore[no-any-return]


def _trust_here() -> None:
    """Let YAMLs import this package, Lightning, torch and the working directory's modules, and nothing else."""
    here = Path.cwd()
    if str(here) not in sys.path:
        sys.path.insert(0, str(here))
    allowed = ALLOWED + own_modules(here) + [m for m in os.environ.get("MMGEN_ALLOW", "").split(",") if m]
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True, import_path_denylist=["*"], import_path_allowlist=allowed)


def _quiet() -> None:
    """Leave out what a user can do nothing about."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    known = ("`isinstance\\(treespec", "Found .* in eval mode", "Total length of `list`", "The '.*_dataloader' does not have many")
    exact = (
        "You're resuming from a checkpoint that ended before the epoch",
        "You are using a custom batch sampler",
    )  # the data module's job
    for message in (*known, *exact):
        warnings.filterwarnings("ignore", message)


def main(args: ArgsType = None, run: bool = True) -> LightningCLI:
    """Run ``lightning <fit|validate|test|predict> -c experiment.yaml`` with ``args`` or the command line's.

    A YAML can import this package, Lightning, torch and the modules of the working directory; more by ``MMGEN_ALLOW=name,name``.

    Args:
        run: ``False`` makes model, data and trainer without running a command; ``args`` then name no command.
    """
    _trust_here()
    _quiet()
    mode = {"parser_mode": "omegaconf+", "exit_on_error": False}
    return CLI(
        args=args,
        run=run,
        save_config_callback=None,
        seed_everything_default=True,
        parser_kwargs={**mode, **({name: dict(mode) for name in LightningCLI.subcommands()} if run else {})},
        trainer_defaults={"use_distributed_sampler": False, "enable_model_summary": False},
    )


def command() -> int:
    """The command line: an error that a user can mend is one line, and the exit status 1."""
    import argparse

    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import OmegaConfBaseException

    parsing = (argparse.ArgumentError, OmegaConfBaseException, MisconfigurationException)
    try:
        main()
    except KeyboardInterrupt:
        return 130
    except (*parsing, ValueError, TypeError, KeyError, OSError, ImportError, NotImplementedError) as error:
        if os.environ.get("MMGEN_TRACEBACK"):
            raise
        print(f"error: {one_line(error)}  (MMGEN_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    return 0

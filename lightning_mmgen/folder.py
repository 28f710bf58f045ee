"""Where a run writes."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakKeyDictionary

from lightning import Trainer

_folders: WeakKeyDictionary[Trainer, Path | None] = WeakKeyDictionary()


def run_folder(trainer: Trainer) -> Path | None:
    """The run's folder, which ranks ask rank 0 for when they first ask, all together; ``Trainer.log_dir`` would do so every time, and
    hang where one rank asks alone."""
    if trainer not in _folders:
        _folders[trainer] = None if trainer.log_dir is None else Path(trainer.log_dir)
    return _folders[trainer]

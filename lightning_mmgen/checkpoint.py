"""Checkpoints that a kill cannot break: written beside, synced, renamed; read without unpickling code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """One file a checkpoint. Whatever happens while it is written, the file of that name is the old one or the new one, whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        """Raises: OSError: the disk is full, say; the checkpoint of before is untouched."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f".{target.name}.{checkpoint.get('global_step', 0)}.staging")
        try:
            with staging.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staging, target)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load_checkpoint(self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Plain types and tensors only.

        Raises:
            FileNotFoundError: no such checkpoint.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such checkpoint")
        return dict(torch.load(path, map_location=map_location, weights_only=True))

"""Checkpoints that a kill cannot break: written beside, synced, renamed; read without unpickling code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from .files import whole_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """One file a checkpoint. Whatever happens while it is written, the file of that name is the old one or the new one, whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        """Raises: OSError: the disk is full, say; the checkpoint of before is untouched."""
        target = Path(path)
        try:
            with whole_file(target, str(checkpoint.get("global_step", 0))) as file:
                torch.save(checkpoint, file)
        except BaseException as error:
            cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it behind a RuntimeError
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from error
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
            ValueError: the file is damaged, or would run code.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such checkpoint")
        try:
            return dict(torch.load(path, map_location=map_location, weights_only=True))
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).split(".")[0] or type(error).__name__
            raise ValueError(f"{path}: not a checkpoint of plain types and tensors, or damaged ({reason})") from error


def trained_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's run has trained, by name: the averaged weights where it kept an average."""
    ema = next((state for key, state in checkpoint["callbacks"].items() if key.startswith("EMA")), None)
    return ema["mean"] if ema and ema["mean"] else checkpoint["state_dict"]  # type: ignore[no-any-return]

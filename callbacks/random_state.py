"""The generators of the process, for a resume that repeats what would have happened."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class RandomState(Callback):
    """Saves the states of torch, numpy and Python, and restores them before the first batch after a resume.

    Order and noise of the data do not need it (they follow from the seed); dropout within the networks does.
    """

    def __init__(self) -> None:
        self.saved: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        _, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
        version, internal, gauss = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": [keys.tolist(), int(position), int(has_gauss), float(cached)],  # type: ignore[attr-defined, union-attr]
            "python": [version, list(internal), gauss],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.saved is None:
            return
        torch.set_rng_state(self.saved["torch"])
        if self.saved["cuda"]:
            torch.cuda.set_rng_state_all(self.saved["cuda"])
        keys, *rest = self.saved["numpy"]
        np.random.set_state(("MT19937", np.array(keys, np.uint32), *rest))
        version, internal, gauss = self.saved["python"]
        random.setstate((version, tuple(internal), gauss))
        self.saved = None

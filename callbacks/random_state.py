"""The generators of the process, for a resume that repeats what would have happened."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lightning_mmgen.ranks import of_all_ranks, several


class RandomState(Callback):
    """Saves the states of torch, numpy and Python of every process, and restores them before the first batch after a resume.

    Order and noise of the data do not need it (they follow from the seed); dropout within the networks does. Processes begin with seeds of
    their own, so that dropout differs among them; where a run goes on with another number of processes, they do so too.
    """

    def __init__(self) -> None:
        self.saved: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.saved is None and trainer.global_rank:
            torch.manual_seed((torch.initial_seed() + 7919 * trainer.global_rank + trainer.global_step) % 2**63)

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": of_all_ranks(self.own())}

    def own(self) -> dict[str, Any]:
        """The states of this process."""
        _, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
        version, internal, gauss = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": [keys.tolist(), int(position), int(has_gauss), float(cached)],  # type: ignore[attr-defined, union-attr]
            "python": [version, list(internal), gauss],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ranks = state_dict.get("ranks", [state_dict])
        rank, world = (dist.get_rank(), dist.get_world_size()) if several() else (0, 1)
        self.saved = ranks[rank] if len(ranks) == world else None

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

"""The checkpoint of a fit's last step."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint


class LastCheckpoint(Callback):
    """Brings ``last.ckpt`` up to the last step when a fit ends; Lightning's ``ModelCheckpoint`` writes it every so many steps only,
    and training since then would be lost."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where a run goes on, its step is saved already; ``ModelCheckpoint`` does not know, and would save it anew in the middle of the
        gradients' accumulation, and lose what had accumulated."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and trainer.global_step:
                callback._last_global_step_saved = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_last and not callback._should_skip_saving_checkpoint(trainer):
                callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))

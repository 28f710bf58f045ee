"""The layout of the dashboard and the run's rates beside its final scores."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from .drift import DriftEvaluation
from .loggers import latest_scores
from .ratings import RatingsEvaluation
from .scoring import COUNTS

NO_SCORES = "|".join(name.removeprefix("held_out/") for name in ("drift", *COUNTS))
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "training": {
        "loss by term": ["Multiline", ["loss"]],
        "loss by timestep": ["Multiline", ["timestep_loss/"]],
        "learning rate by row": ["Multiline", ["lr-"]],
        "gradient norm by row": ["Multiline", ["gradient_norm/"]],
    },
    "held-out instructions": {
        "scores": ["Multiline", [f"held_out/(?!{NO_SCORES})"]],
        "drift: MSE": ["Multiline", ["held_out/drift_mse"]],
        "drift: PSNR, SSIM": ["Multiline", ["held_out/drift_(psnr|ssim)"]],
        "SC by task": ["Multiline", ["ratings/sc/"]],
        "PQ by task": ["Multiline", ["ratings/pq/"]],
        "O by task": ["Multiline", ["ratings/o_instruct_imagen/"]],
    },
    "machine and data": {
        "samples per second": ["Multiline", ["throughput/samples_per_second"]],
        "share of time waiting": ["Multiline", ["throughput/waiting"]],
        "peak memory, GB": ["Multiline", ["throughput/peak_memory_gb"]],
        "data errors, bad pictures": ["Multiline", ["data/", "held_out/bad_pictures"]],
    },
}
"""Charts of TensorBoard's *custom scalars*, by group; each line is a tag that begins with one of the patterns."""
NEEDED = {"drift": DriftEvaluation, "by task": RatingsEvaluation}
"""What fills the charts of these names."""


class Dashboard(Callback):
    """Lays the dashboard out once, and fills its HParams tab at the end, be it an interruption: how each row trains, and the last value of
    every score."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        settings = hyperparameters(trainer, pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout(trainer))
            else:
                logger.log_hyperparams(settings)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fill(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._fill(trainer, pl_module)

    def _fill(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scores = {f"final/{name.removeprefix('held_out/')}": value for name, value in final_scores(trainer).items()}  # not on their curves
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and scores:
                logger.log_hyperparams(hyperparameters(trainer, pl_module), scores, trainer.global_step)


def layout(trainer: Trainer) -> dict[str, dict[str, list[Any]]]:
    """``LAYOUT`` without the charts that this run leaves empty."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    empty = [words for words, kind in NEEDED.items() if not any(isinstance(c, kind) for c in callbacks)]
    return {
        group: {name: lines for name, lines in charts.items() if not any(words in name for words in empty)}
        for group, charts in LAYOUT.items()
    }


def hyperparameters(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """How each row of the parameter table trains, and on how much."""
    out: dict[str, Any] = {}
    for row in getattr(getattr(pl_module, "table", None), "rows", ()):
        out[f"training {row.match}"] = row.train if row.train != "lora" else f"lora rank {row.rank}"
        if row.lr is not None:
            out[f"lr {row.match}"] = row.lr
    data = trainer.datamodule  # type: ignore[attr-defined]
    size = getattr(data, "batch_size", None)
    samples = {} if size is None else {"samples a step": size * trainer.world_size * trainer.accumulate_grad_batches}
    return out | samples | {"steps": trainer.max_steps, "precision": str(trainer.precision)}


def final_scores(trainer: Trainer) -> dict[str, float]:
    """The last value of every score of the evaluations, counts apart, and of the loss."""
    loss = trainer.callback_metrics.get("loss")
    scores = {name: value for name, value in latest_scores(trainer).items() if name not in COUNTS}
    return scores | ({} if loss is None else {"loss": float(loss)})

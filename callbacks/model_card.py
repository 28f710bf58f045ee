"""The model card of a run."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lightning_mmgen.data.streams import Stream
from lightning_mmgen.folder import run_folder

from .dashboard import final_scores
from .loggers import log_text


class ModelCard(Callback):
    """Writes ``card.md`` to the run folder and the dashboard at the end of a fit: what was trained and how, on which data, and the
    scores."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero or folder is None:
            return
        text = card(trainer, pl_module)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "card.md").write_text(text)
        log_text(trainer, "model card", text)


def card(trainer: Trainer, pl_module: LightningModule) -> str:
    """The card as Markdown."""
    parts = [f"# {type(pl_module).__name__}, {trainer.global_step} steps"]
    data = trainer.datamodule  # type: ignore[attr-defined]
    source = getattr(data, "train", None)
    if source is not None:
        held = f"{source.shards:,} shards" if isinstance(source, Stream) else f"{len(source):,} rows"
        size = getattr(data, "batch_size", 0) * trainer.world_size * trainer.accumulate_grad_batches
        parts.append(f"Trained on {type(source).__name__} with {held}, {size} samples a step, precision {trainer.precision}.")
        if bad := getattr(data, "bad", None):
            parts.append(f"{len(bad)} rows could not be used; `bad_rows.0.jsonl` names them.")
    if table := getattr(pl_module, "table", None):
        parts += ["## Parameters", table.markdown()]
    if scores := final_scores(trainer):
        lines = ["score | value", "--- | ---", *(f"{name} | {value:.4f}" for name, value in sorted(scores.items()))]
        parts += [
            "## Scores",
            "\n".join(lines),
            "Scores of different backbones are not comparable. `evaluation/` has a row for every picture.",
        ]
    parts += [
        "## Reproduce",
        "`config.yaml` is the configuration, `run.json` has the command, versions and the data's fingerprint.",
    ]
    return "\n\n".join(parts) + "\n"

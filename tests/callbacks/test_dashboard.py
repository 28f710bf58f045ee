"""One tiny fit and what three loggers got of it: TensorBoard, CSV, and one with the interface of Weights & Biases."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning_mmgen.callbacks import CLIPScoreEvaluation, Dashboard, PictureGrid, Throughput, TimestepLoss, log_scores
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor

from lightning_mmgen.cli import main
from lightning_mmgen.losses import DenoisingStep, LossTerm

STEPS = 4


class Media(Logger):
    """Keeps what it is given; Lightning's WandbLogger has the same methods."""

    name, version = "media", "0"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.scalars, self.texts, self.pictures, self.settings = folder, {}, {}, {}, {}  # type: ignore[var-annotated]

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.scalars.update(metrics)

    def log_hyperparams(self, params: Any, *_: Any) -> None:
        self.settings.update(params)

    def log_text(self, key: str, columns: list[str], data: list[list[str]], step: int) -> None:
        self.texts[key] = data[0][0]

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.pictures[key] = images[0].size


class Witness(LossTerm):
    """Computes plainly what the dashboard shows."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: defaultdict[int, list[float]] = defaultdict(list)
        self.norms: list[dict[str, float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.module: Any = pl_module

    def compute(self, step: DenoisingStep) -> dict[str, Tensor]:
        target = self.module.diffusion.target(step.z0, step.noise, step.timesteps)
        for i, t in enumerate(step.timesteps.tolist()):
            self.errors[t // 100].append(float(((step.prediction[i] - target[i]).detach() ** 2).mean()))
        return {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        squares: defaultdict[str, float] = defaultdict(float)
        for name, p in pl_module.named_parameters():
            if p.grad is not None:
                squares[".".join(name.split(".")[: 2 if name.startswith("encoder") else 1])] += float((p.grad.double() ** 2).sum())
        self.norms.append({row: value**0.5 for row, value in squares.items()})


@pytest.fixture(scope="module")
def fitted(experiment: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Witness, Media, EventAccumulator]:
    """Logged at every other step; the bins average over two."""
    folder = tmp_path_factory.mktemp("dashboard")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MMGEN_ALLOW", "tests")
        cli = main(["-c", str(experiment), f"--trainer.max_steps={STEPS}", "--trainer.log_every_n_steps=2"], run=False)
        witness, media = Witness(), Media(folder / "media")
        looks = [CLIPScoreEvaluation(every=2, count=2, model=str(clip)), PictureGrid(count=2)]
        cli.trainer.callbacks[1:1] = [witness, *looks]  # type: ignore[attr-defined]
        cli.trainer.loggers = [TensorBoardLogger(str(folder), "tb"), CSVLogger(str(folder), "csv"), media]
        cli.trainer.fit(cli.model, cli.datamodule)
    events = EventAccumulator(str(folder / "tb" / "version_0"))
    events.Reload()
    return cli.trainer, witness, media, events


def rows(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {e.step: e.value for e in events.Scalars(tag)}


def test_gradient_norms_are_those_of_the_rows(fitted: tuple[Any, Witness, Media, EventAccumulator]) -> None:
    _, witness, _, events = fitted
    assert len(witness.norms) == STEPS
    for row in ("encoder.projector", "encoder.language", "adapter", "unet"):
        expected = {step: witness.norms[step - 1][row] for step in (2, 4) if row in witness.norms[step - 1]}
        assert rows(events, f"gradient_norm/{row}") == pytest.approx(expected, rel=1e-4) and min(expected.values()) > 0


def test_the_bins_hold_the_mean_error_of_their_timesteps(fitted: tuple[Any, Witness, Media, EventAccumulator]) -> None:
    _, witness, media, events = fitted
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("timestep_loss/")]
    assert tags and {int(tag[14:18]) // 100 for tag in tags} == set(witness.errors)
    assert sum(len(e) for e in witness.errors.values()) == STEPS * 2
    for tag in tags:
        errors = witness.errors[int(tag[14:18]) // 100]
        if len(rows(events, tag)) == 1:
            assert media.scalars[tag] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert any(len(rows(events, tag)) == 1 for tag in tags)
    with pytest.raises(ValueError, match="bins must be 1 or more"):
        TimestepLoss(0)


def test_the_layout_is_written_once_and_its_charts_have_lines(fitted: tuple[Any, Witness, Media, EventAccumulator]) -> None:
    *_, events = fitted
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    lines = {title: [t for t in events.Tags()["scalars"] if any(re.match(p, t) for p in tags)] for title, tags in charts.items()}
    assert all(lines.values()) and "drift: MSE" not in charts
    assert set(lines["loss by term"]) == {"loss", "loss/diffusion"}
    assert lines["scores"] == ["held_out/clip_t"], "on one axis with counts, scores are a flat line"
    assert "held_out/bad_pictures" in lines["data errors, bad pictures"]
    assert len(lines["learning rate by row"]) == len(lines["gradient norm by row"]) == 4


def test_hparams_hold_the_rates_and_the_final_scores(fitted: tuple[Any, Witness, Media, EventAccumulator]) -> None:
    _, _, media, events = fitted
    contents = [HParamsPluginData.FromString(c) for c in events.PluginTagToContent("hparams").values()]
    (started,) = (c.session_start_info for c in contents if c.WhichOneof("data") == "session_start_info")
    values = {name: value.number_value or value.string_value for name, value in started.hparams.items()}
    expected = {
        "lr adapter": 3e-2,
        "lr unet": 4e-2,
        "training encoder.vision": "frozen",
        "training unet": "lora rank 2",
        "samples a step": 2,
    }
    assert {name: values[name] for name in expected} == expected == {name: media.settings[name] for name in expected}
    (experiment,) = (c.experiment for c in contents if c.WhichOneof("data") == "experiment")
    assert {m.name.tag for m in experiment.metric_infos} == {"final/clip_t", "final/loss"}
    assert list(rows(events, "held_out/clip_t")) == [0, 2, 4]


def test_a_run_that_was_interrupted_has_its_hparams_too(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    trainer = Trainer(accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False)
    log_scores(trainer, {"held_out/dino": 0.5})
    Dashboard().on_exception(trainer, LightningModule(), KeyboardInterrupt())
    logger.finalize("failed")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    contents = [HParamsPluginData.FromString(c) for c in events.PluginTagToContent("hparams").values()]
    (experiment,) = (c.experiment for c in contents if c.WhichOneof("data") == "experiment")
    assert [m.name.tag for m in experiment.metric_infos] == ["final/dino"]


def test_other_loggers_get_the_same(fitted: tuple[Any, Witness, Media, EventAccumulator]) -> None:
    trainer, _, media, events = fitted
    tags = {tag for tag in events.Tags()["scalars"] if not tag.startswith("final/")}  # of the HParams tab
    with (Path(trainer.loggers[1].log_dir) / "metrics.csv").open() as file:
        assert set(next(csv.reader(file))) - {"step"} == tags
    assert tags <= set(media.scalars) and media.pictures["pictures"][0] > 0
    texts = {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"] if tag.endswith("/text_summary")}
    assert texts == set(media.texts) == {"config", "parameters", "instructions", "model card"}
    assert "[ref#1]" in media.texts["instructions"] and "| 0.03 |" in media.texts["model card"]
    assert (Path(trainer.loggers[0].log_dir) / "card.md").read_text() == media.texts["model card"]
    line = (Path(trainer.loggers[0].log_dir) / "evaluation" / "clip_score.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["step"] == STEPS


def test_throughput_counts_samples_without_the_looks(fitted: tuple[Any, Witness, Media, EventAccumulator]) -> None:
    trainer, _, media, events = fitted
    rate, step = (rows(events, f"throughput/{name}") for name in ("samples_per_second", "step_seconds"))
    assert list(rate) == [2, 4] and all(rate[i] * step[i] == pytest.approx(2, rel=1e-5) for i in rate)
    (throughput,) = (c for c in trainer.callbacks if isinstance(c, Throughput))
    assert trainer.callbacks[0] is throughput and sum(2 * s for s in step.values()) < throughput.state_dict()["seconds"]
    assert 0 <= media.scalars["throughput/waiting"] < 1 and media.scalars["throughput/peak_memory_gb"] > 0.05
    resumed = Throughput()
    resumed.load_state_dict({"seconds": 50.0})
    resumed.on_train_start(trainer, trainer.lightning_module)
    assert resumed.elapsed() >= 50 and torch.tensor(resumed.elapsed()) < 51

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch.cli import LightningCLI
from lightning_mmgen.callbacks import CaptionTeacher
from lightning_mmgen.callbacks.caption_teacher import foils_of, words
from torch import Tensor

from lightning_mmgen.cli import main
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.diffusion import ConditionDropout
from lightning_mmgen.losses import DenoisingStep
from lightning_mmgen.models.attention import layers_of

from ..conftest import DROPOUT_ROWS, logged

SOURCE = {"class_path": "ToyboxSource", "init_args": {"tasks": {"subject": 1.0}, "length": 12}}


def fit(experiment: Path, out: Path, *more: str, **settings: float) -> LightningCLI:
    """Three steps on subjects, with dropout of LoRA and of conditions."""
    teacher = {"class_path": "CaptionTeacher", "init_args": settings}
    data = (f"--data.init_args.train={json.dumps(SOURCE)}", "--data.init_args.batch_size=4")
    model = (f"--model.init_args.parameters={json.dumps(DROPOUT_ROWS)}", "--model.init_args.condition_dropout.both=0.3")
    where = (f"--trainer.logger.init_args.save_dir={out}", f"--trainer.callbacks+={json.dumps(teacher)}")
    return main(["fit", "-c", str(experiment), *data, *model, *where, *(more or ["--trainer.max_steps=3"])])


@pytest.fixture(scope="module")
def run(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LightningCLI, Path]:
    """A fit with all terms, and where it lies."""
    out = tmp_path_factory.mktemp("run")
    return fit(experiment, out, weight=0.5, features=2.0, pooled=3.0, details=4.0), out


def teacher_of(cli: LightningCLI) -> CaptionTeacher:
    return next(c for c in cli.trainer.callbacks if isinstance(c, CaptionTeacher))


def a_step(cli: LightningCLI, empty: int = 0) -> DenoisingStep:
    """What a training step knows of four records, nothing dropped, the first ``empty`` without a caption."""
    batch, _ = next(iter(cli.datamodule.train_dataloader()))
    cli.model.condition_dropout = ConditionDropout(0.0)
    cli.model.train()
    with teacher_of(cli).watching(cli.model):
        return cli.model.denoising_step(batch._replace(descriptions=[*[""] * empty, *batch.descriptions[empty:]]))  # type: ignore[no-any-return]


def by_hand(cli: LightningCLI, step: DenoisingStep, texts: list[str] | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
    """The first weights' prediction from the descriptions (or these texts), the outputs of the UNet's cross-attention, and the pooled
    vectors."""
    module, outputs = cli.model, []
    kept = {n: p.detach().clone() for n, p in module.trainable().items()}
    layers = [m for n, m in module.unet.named_modules() if n.endswith("attn2")]
    assert layers == list(layers_of(module.unet).values())
    hooks = [m.register_forward_hook(lambda _, __, out: outputs.append(out)) for m in layers]
    module.eval()
    with torch.no_grad():
        for n, p in module.trainable().items():
            p.copy_(teacher_of(cli).first[n])
        condition = module.adapter(module.encoder(texts or step.batch.descriptions, [[]] * 4, []))
        prediction = module(step.z_t, step.timesteps, condition, tuple(step.batch.target.shape[-2:]))
        for n, p in module.trainable().items():
            p.copy_(kept[n])
    for hook in hooks:
        hook.remove()
    module.train()
    return prediction, outputs, condition.pooled


def test_all_terms_are_logged_and_part_of_the_loss(run: tuple[LightningCLI, Path]) -> None:
    losses = logged(run[1])
    taught = {"loss/taught", "loss/taught_features", "loss/taught_pooled", "loss/taught_details"}
    assert set(losses) == {"loss", "loss/diffusion"} | taught
    assert all(min(losses[name]) > 0 for name in taught)
    np.testing.assert_allclose(np.sum([v for tag, v in losses.items() if tag != "loss"], axis=0), losses["loss"], rtol=1e-5)


def test_the_terms_are_those_of_the_definition(run: tuple[LightningCLI, Path]) -> None:
    cli, _ = run
    step = a_step(cli)
    own = [*teacher_of(cli).seen.values()]
    found = teacher_of(cli).compute(step)
    prediction, outputs, pooled = by_hand(cli, step)
    torch.testing.assert_close(found["taught"], (step.prediction - prediction).square().mean())
    shares = [((f - t).square().sum((1, 2)) / t.square().sum((1, 2))).mean() for f, t in zip(own, outputs, strict=True)]
    torch.testing.assert_close(found["taught_features"], 2 * torch.stack(shares).mean())
    mine = step.condition.pooled
    assert mine is not None
    torch.testing.assert_close(found["taught_pooled"], 3 * ((mine - pooled).square().sum(1) / pooled.square().sum(1)).mean())


def test_details_are_what_tells_the_description_from_its_foil(run: tuple[LightningCLI, Path]) -> None:
    cli, _ = run
    step = a_step(cli)
    step = step._replace(batch=step.batch._replace(foils=[*step.batch.foils[:3], ""]))
    seen = dict(teacher_of(cli).seen)
    found = teacher_of(cli).compute(step)["taught_details"]
    (_, told, _), (_, other, _) = by_hand(cli, step), by_hand(cli, step, [*step.batch.foils[:3], "nothing"])
    parts = []
    for f, t, o in zip(seen.values(), told, other, strict=True):
        along = (t - o).flatten(1) / (t - o).flatten(1).norm(dim=1, keepdim=True)  # unit vectors
        parts.append((((f - t).flatten(1) * along).sum(1) / t.flatten(1).norm(dim=1)) ** 2)
    torch.testing.assert_close(found, 4 * torch.stack(parts)[:, :3].mean())  # the fourth record has no foil
    teacher_of(cli).seen = seen
    gone = teacher_of(cli).compute(step._replace(batch=step.batch._replace(foils=None)))["taught_details"]
    assert gone == 0 and gone.requires_grad


def test_the_teacher_is_the_model_as_the_fit_found_it(run: tuple[LightningCLI, Path], experiment: Path, tmp_path: Path) -> None:
    first = teacher_of(run[0]).first
    assert first.keys() == run[0].model.trainable().keys()
    assert any(not torch.equal(p, first[n]) for n, p in run[0].model.trainable().items())
    assert all(not w.any() for n, w in first.items() if "lora_B" in n)  # nothing added yet
    fit(experiment, tmp_path / "half", "--trainer.max_steps=2")
    last = tmp_path / "half" / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    resumed = fit(experiment, tmp_path / "rest", "--trainer.max_steps=3", "--ckpt_path", str(last))
    whole = fit(experiment, tmp_path / "whole")
    assert all(torch.equal(w, first[n]) for n, w in teacher_of(resumed).first.items())
    assert all(torch.equal(p, whole.model.trainable()[n]) for n, p in resumed.model.trainable().items())


def test_a_fit_that_starts_from_a_taught_run_keeps_its_teacher(run: tuple[LightningCLI, Path], experiment: Path, tmp_path: Path) -> None:
    start = run[1] / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    second = fit(experiment, tmp_path, "--trainer.max_steps=1", f"--model.init_args.start={start}")
    first, kept = teacher_of(run[0]).first, teacher_of(second).first
    assert kept.keys() == first.keys() and all(torch.equal(w, first[n]) for n, w in kept.items())


def test_a_caption_read_in_place_of_itself_teaches_nothing(experiment: Path, tmp_path: Path) -> None:
    cli = fit(experiment, tmp_path, "--trainer.max_steps=1", "--model.init_args.schedule.warmup=1000000000")
    step = a_step(cli)
    cli.model.eval()
    with torch.no_grad(), teacher_of(cli).watching(cli.model):
        batch = step.batch._replace(instructions=step.batch.descriptions, markers=[[]] * 4, references=[])
        height, width = batch.target.shape[-2:]
        prediction = cli.model(step.z_t, step.timesteps, cli.model.condition(batch), (height, width))
        same = step._replace(batch=batch, prediction=prediction)
    cli.model.training = True  # of the module alone: its parts draw no dropout
    found = teacher_of(cli).compute(same)
    assert found["taught"] < 1e-8 and found["taught_features"] < 1e-8
    assert teacher_of(cli).compute(a_step(cli))["taught"] > 1e-4


def test_samples_without_a_caption_add_nothing(run: tuple[LightningCLI, Path]) -> None:
    cli, _ = run
    some = a_step(cli, empty=2)
    found = teacher_of(cli).compute(some)
    prediction, *_ = by_hand(cli, some)
    torch.testing.assert_close(found["taught"], (some.prediction - prediction)[2:].square().mean())
    gone = teacher_of(cli).compute(a_step(cli, empty=4))
    assert gone["taught"] == 0 and gone["taught"].requires_grad


def test_a_caption_is_read_without_the_words_that_a_template_puts_around_it(run: tuple[LightningCLI, Path]) -> None:
    asked = ["Draw this: a toy", "a toy", "Draw a toy", "Draw this: a toy"]
    batch = a_step(run[0]).batch._replace(instructions=asked, captions=["a toy.", "a toy", "a large toy", ""], descriptions=["all"] * 4)
    assert words(batch._replace(markers=[[]] * 4)) == ["a toy", "a toy", "Draw a toy", "Draw this: a toy"]


def test_words_without_pictures_are_read_as_they_are(run: tuple[LightningCLI, Path]) -> None:
    batch = a_step(run[0]).batch._replace(instructions=["", "[ref#1]", "a toy", "a [ref#1] toy"], descriptions=["a", "b", "c", ""])
    batch = batch._replace(markers=[[], [1], [], [1]], foils=["f", "g", "", "h"])
    assert words(batch) == ["", "b", "a toy", None]
    assert foils_of(batch, words(batch)) == {1: "g"}  # without pictures or a description nothing tells it from the target


def test_words_without_pictures_teach_what_they_said(run: tuple[LightningCLI, Path]) -> None:
    cli, _ = run
    step = a_step(cli)
    bare = step.batch._replace(instructions=["a toy"] * 4, markers=[[]] * 4, references=[], descriptions=[""] * 4)
    found = teacher_of(cli).compute(step._replace(batch=bare))
    prediction, *_ = by_hand(cli, step._replace(batch=bare._replace(descriptions=["a toy"] * 4)))
    torch.testing.assert_close(found["taught"], (step.prediction - prediction).square().mean())


def test_held_out_batches_have_no_teacher(run: tuple[LightningCLI, Path]) -> None:
    step = a_step(run[0])
    run[0].model.eval()
    assert teacher_of(run[0]).compute(step) == {}


@pytest.mark.parametrize("settings", [{"prediction": -1.0}, {"details": -1.0}, {"prediction": 0.0, "features": 0.0}])
def test_shares_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="0 or more, and not all 0"):
        CaptionTeacher(**settings)


def test_a_share_of_zero_is_absent(experiment: Path, tmp_path: Path) -> None:
    fit(experiment, tmp_path, "--trainer.max_steps=1", features=0.0)
    assert set(logged(tmp_path)) == {"loss", "loss/diffusion", "loss/taught"}


def test_a_unet_without_a_pooled_vector_has_no_share_of_it(run: tuple[LightningCLI, Path], sd15_unet: UNet2DConditionModel) -> None:
    cli, teacher = run[0], CaptionTeacher(pooled=1.0)
    teacher.setup(cli.trainer, cli.model, "fit")
    own, cli.model.unet = cli.model.unet, sd15_unet
    try:
        with pytest.raises(ValueError, match="this UNet takes no pooled vector"):
            teacher.on_train_start(cli.trainer, cli.model)
    finally:
        cli.model.unet = own


def test_descriptions_tell_what_references_show() -> None:
    source = ToyboxSource({"subject": 1.0, "caption": 1.0, "style": 1.0, "control": 1.0, "style_transfer": 1.0})
    other = {"small": "large", "large": "small"}
    for record in map(source.record, range(60)):
        scene = record.extra["truth"].scene
        assert record.description is not None and f", {scene.style} style" in record.description
        assert (record.foil is None) == (record.task == "caption")
        if record.foil is None:
            continue
        assert (f", {scene.style} style" not in record.foil) == (record.task in ("style", "style_transfer"))
        for placed in scene.toys:
            marks = "".join(f" {name} {mark}" for name, mark in placed.toy.measures().items())
            if record.task in ("style", "control"):
                marks = ""
            assert f"{placed.size} {placed.toy.words()}{marks} " in record.description
            turned = re.sub(r"\d", lambda digit: str(9 - int(digit[0])), marks)  # the other end of the same scale
            size = other[placed.size] if record.task in ("control", "style_transfer") else placed.size
            assert f"{size} {placed.toy.words()}{turned} " in record.foil
        if record.task in ("style", "control"):
            assert record.description == record.caption

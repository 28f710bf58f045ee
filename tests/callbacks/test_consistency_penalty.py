from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning_mmgen.callbacks import EMA, ConsistencyPenalty
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from lightning_mmgen.batch import Batch
from lightning_mmgen.cli import main
from lightning_mmgen.diffusion import ConditionDropout
from lightning_mmgen.losses import DenoisingStep, LinearSchedule, composite, earlier, latent_mask, spatial, touched, turns
from lightning_mmgen.models.dino import Dino

from ..conftest import DROPOUT_ROWS, logged

TERMS = ("spatial", "temporal", "pixels", "turns", "identity")
ON = {"spatial": {"start": 0.0, "end": 0.5, "steps": 2}, "temporal": 0.5, "pixels": 0.5, "turns": 0.5, "identity": 0.5}


@pytest.fixture(scope="session")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a DINOv2 for pictures of 16 px."""
    folder = tmp_path_factory.mktemp("dino")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**size, initializer_range=0.5)).save_pretrained(folder)
    return str(folder)


def fit(experiment: Path, out: Path, penalty: dict[str, Any] | None) -> LightningCLI:
    """Three steps on edits, with dropout and an average; ``penalty``: the callback's arguments, None for none."""
    callbacks = [{"class_path": "EMA", "init_args": {"decay": 0.9}}]
    if penalty is not None:
        callbacks.append({"class_path": "ConsistencyPenalty", "init_args": penalty})
    source = {"class_path": "ToyboxSource", "init_args": {"tasks": {"edit": 1.0}, "length": 12}}
    data = ("--data.class_path=EditDataModule", f"--data.init_args.train={json.dumps(source)}", "--data.init_args.batch_size=4")
    model = (f"--model.init_args.parameters={json.dumps(DROPOUT_ROWS)}", "--trainer.max_steps=3")
    added = (f"--trainer.callbacks+={json.dumps(c)}" for c in callbacks)
    return main(["fit", "-c", str(experiment), *data, *model, f"--trainer.logger.init_args.save_dir={out}", *added])


def weights(cli: LightningCLI) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in cli.model.trainable().items()}


@pytest.fixture(scope="module")
def run(experiment: Path, dino: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[LightningCLI, Path]:
    """A fit with all terms, and where it lies."""
    out = tmp_path_factory.mktemp("run")
    return fit(experiment, out, {**ON, "identity_model": dino}), out


def penalty_of(cli: LightningCLI) -> ConsistencyPenalty:
    return next(c for c in cli.trainer.callbacks if isinstance(c, ConsistencyPenalty))


def a_batch(cli: LightningCLI) -> Batch:
    """Twelve edits, local and global."""
    data = cli.datamodule
    data.batch_size = 12
    batch, _ = next(iter(data.train_dataloader()))
    return batch  # type: ignore[no-any-return]


def a_step(cli: LightningCLI, **edit: Tensor) -> DenoisingStep:
    """What a training step knows of them, nothing dropped; ``edit`` replaces fields of the batch's."""
    batch = a_batch(cli)
    assert batch.edit is not None
    cli.model.condition_dropout = ConditionDropout(0.0)
    return cli.model.denoising_step(batch._replace(edit=batch.edit._replace(**edit)))


def test_every_term_is_logged_and_part_of_the_loss(run: tuple[LightningCLI, Path]) -> None:
    losses = logged(run[1])
    assert set(losses) == {"loss", "loss/diffusion", *(f"loss/{name}" for name in TERMS)}
    assert all(np.isfinite(values).all() for values in losses.values())
    parts = np.sum([[0, *values][-3:] for tag, values in losses.items() if tag != "loss"], axis=0)
    np.testing.assert_allclose(parts, losses["loss"], rtol=1e-5)
    assert (
        min(losses["loss/spatial"]) > 0
        and min(losses["loss/temporal"]) > 0
        and max(losses["loss/pixels"]) > 0
        and max(losses["loss/identity"]) > 0
    )
    assert not any(losses["loss/turns"])  # the toybox's edits here have one turn


def test_two_fits_of_one_seed_are_equal_to_the_last_bit(
    run: tuple[LightningCLI, Path], experiment: Path, dino: str, tmp_path: Path
) -> None:
    again = fit(experiment, tmp_path, {**ON, "identity_model": dino})
    assert logged(tmp_path) == logged(run[1])
    assert all(torch.equal(w, weights(again)[n]) for n, w in weights(run[0]).items())


def test_a_penalty_of_zeros_trains_as_if_it_were_not_there(run: tuple[LightningCLI, Path], experiment: Path, tmp_path: Path) -> None:
    plain = fit(experiment, tmp_path / "plain", None)
    zeros = fit(experiment, tmp_path / "zeros", dict.fromkeys(TERMS, 0))
    assert logged(tmp_path / "plain") == logged(tmp_path / "zeros")
    assert all(torch.equal(w, weights(zeros)[n]) for n, w in weights(plain).items())
    assert logged(tmp_path / "plain")["loss/diffusion"][0] == logged(run[1])["loss/diffusion"][0]  # the first step draws the same dropout
    assert any(not torch.equal(w, weights(run[0])[n]) for n, w in weights(plain).items())


def test_a_term_follows_its_schedule_and_is_absent_where_it_is_zero(run: tuple[LightningCLI, Path]) -> None:
    cli, out = run
    assert len(logged(out)["loss/diffusion"]) == 3 and len(logged(out)["loss/spatial"]) == 2
    schedule = LinearSchedule(0.0, 4.0, 2)
    assert [schedule.at(step) for step in range(4)] == [0, 2, 4, 4]
    with torch.no_grad():
        step, terms = a_step(cli), []
        for end in (1.0, 2.0):
            penalty = ConsistencyPenalty(spatial=LinearSchedule(0, end, 6))
            penalty.setup(cli.trainer, cli.model, "fit")
            terms.append(penalty.compute(step))
    assert cli.trainer.global_step == 3 and [set(t) for t in terms] == [{"spatial"}] * 2
    expected = penalty_of(cli).compute(step)["spatial"]  # at its end
    torch.testing.assert_close(terms[0]["spatial"], expected)
    torch.testing.assert_close(terms[1]["spatial"], 2 * expected)


def test_the_terms_are_those_of_the_definitions(run: tuple[LightningCLI, Path]) -> None:
    cli, _ = run
    turn = torch.tensor([0, 1, 2] * 4)
    with torch.no_grad():
        step = a_step(cli, turn=turn)
        found = penalty_of(cli).compute(step)
    assert step.batch.edit is not None and step.source is not None
    mask = latent_mask(step.batch.edit.mask, (8, 8))
    snr = cli.model.diffusion.snr(step.timesteps).clamp(max=5)
    kept = composite(step.z0, step.source, touched(step.batch.edit.mask, (8, 8)))
    torch.testing.assert_close(found["spatial"], 0.5 * spatial(step.z0_hat, kept, mask, snr))
    torch.testing.assert_close(found["turns"], 0.5 * turns(step.z0_hat, kept, mask, snr, turn))
    assert found["turns"] > 0 and found["turns"] != found["spatial"]
    rim = (mask > 0) & (mask < 1)
    assert (rim & (touched(step.batch.edit.mask, (8, 8)) == 1)).any()
    done = penalty_of(cli).compute(step._replace(z0_hat=kept))
    assert done["spatial"] == 0 and done["turns"] == 0  # the edit that was asked for costs nothing


def test_a_floor_asks_about_noisy_timesteps_too(run: tuple[LightningCLI, Path]) -> None:
    cli, _ = run
    penalty = ConsistencyPenalty(spatial=1.0, pixels=1.0, floor=0.5)
    penalty.setup(cli.trainer, cli.model, "fit")
    step = a_step(cli)
    step = step._replace(timesteps=torch.full((12,), 999))
    assert cli.model.diffusion.snr(step.timesteps).max() < 0.05
    z0_hat = step.z0_hat.detach().requires_grad_()
    found = penalty.compute(step._replace(z0_hat=z0_hat))
    edit, half = step.batch.edits, torch.full((12,), 0.5)
    assert step.source is not None
    kept = composite(step.z0, step.source, touched(edit.mask, (8, 8)))
    torch.testing.assert_close(found["spatial"], spatial(z0_hat, kept, latent_mask(edit.mask, (8, 8)), half))
    torch.testing.assert_close(found["pixels"], spatial(cli.model.codec.reconstruct(z0_hat), edit.source, edit.mask, half))


def test_pixels_compares_what_the_codec_decodes_outside_the_mask(run: tuple[LightningCLI, Path]) -> None:
    cli, _ = run
    step = a_step(cli)
    step = step._replace(timesteps=torch.tensor([0, 100, 300, 500, 700, 999] * 2))
    snr = cli.model.diffusion.snr(step.timesteps)
    assert (snr < 0.05).any() and (snr > 0.05).any()
    z0_hat = step.z0_hat.detach().requires_grad_()
    term = penalty_of(cli).compute(step._replace(z0_hat=z0_hat))["pixels"]
    term.backward()
    edit, expected = step.batch.edits, 0.0
    for i in torch.nonzero(snr >= 0.05).flatten().tolist():
        with torch.no_grad():
            drawn = cli.model.codec.vae.decode(z0_hat[i : i + 1] / 0.5 + 0.3).sample[0]
        keep = (1 - edit.mask[i]).expand(3, -1, -1).double()
        expected += min(float(snr[i]), 5) * float((keep * (drawn - edit.source[i]) ** 2).sum()) / (float(keep.sum()) + 1e-6) / 12
    assert expected > 0 and term.item() == pytest.approx(0.5 * expected, rel=1e-3)
    assert z0_hat.grad is not None
    something = (snr >= 0.05) & (edit.mask < 1).flatten(1).any(1)
    assert z0_hat.grad.abs().sum(dim=(1, 2, 3)).ne(0).tolist() == something.tolist()


def test_the_teacher_is_the_average_at_an_earlier_timestep_of_the_same_noise(run: tuple[LightningCLI, Path]) -> None:
    cli, _ = run
    module, ema = cli.model, next(c for c in cli.trainer.callbacks if isinstance(c, EMA))
    module.train()
    with torch.no_grad():
        step = a_step(cli)
    timesteps = earlier(step.batch.seed, step.timesteps)
    z_t = module.diffusion.add_noise(step.z0, step.noise, timesteps)

    def by_hand() -> Tensor:
        prediction = module(z_t, timesteps, module.condition(step.batch), (16, 16))
        return module.diffusion.estimate_z0(prediction, z_t, timesteps)

    found = penalty_of(cli).teacher(step)
    module.eval()
    with torch.no_grad(), ema.swapped(module):
        expected = by_hand()
    with torch.no_grad():
        current = by_hand()
    module.train()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, current, rtol=1e-2, atol=1e-3)


def test_the_teacher_leaves_no_trace(run: tuple[LightningCLI, Path]) -> None:
    cli, _ = run
    cli.model.train()
    step = a_step(cli)
    modes = [m.training for m in cli.model.modules()]
    before = {n: (p.data_ptr(), p._version) for n, p in cli.model.named_parameters()}
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    teacher = penalty_of(cli).teacher(step)
    assert not teacher.requires_grad and any(modes) and not all(modes)
    assert torch.equal(torch.get_rng_state(), states[0]) and (random.getstate(), str(np.random.get_state())) == states[1:]
    assert modes == [m.training for m in cli.model.modules()]
    assert before == {n: (p.data_ptr(), p._version) for n, p in cli.model.named_parameters()}
    step.prediction.sum().backward()  # the graph of the step is whole


def test_earlier_timesteps_follow_from_each_samples_own_seed() -> None:
    seeds, timesteps = torch.randint(2**62, (4000,)), torch.full((4000,), 800)
    drawn = earlier(seeds, timesteps)
    assert torch.equal(drawn[7:11], earlier(seeds[7:11], timesteps[7:11]))
    assert drawn.min() < 10 and 790 < drawn.max() < 800
    assert drawn.float().mean().item() == pytest.approx(399.5, abs=3 * 231 / 4000**0.5)
    noise = torch.stack([torch.randint(1000, (), generator=torch.Generator().manual_seed(s)) for s in seeds.tolist()])
    assert abs(torch.corrcoef(torch.stack([drawn, noise]).float())[0, 1].item()) < 0.06  # not the stream of the sample's noise
    assert earlier(seeds[:2], torch.tensor([0, 1])).tolist() == [0, 0]


def test_identity_compares_what_the_codec_decodes_over_global_edits_alone(run: tuple[LightningCLI, Path], dino: str) -> None:
    cli, _ = run
    penalty, features = penalty_of(cli), Dino.from_pretrained(dino)
    mask, turn, shown = torch.ones(12, 1, 16, 16), torch.zeros(12, dtype=torch.long), torch.ones(12, dtype=torch.bool)
    mask[0, :, :2], turn[1], shown[2] = 0, -1, False  # in part, no edit, source unseen
    step = a_step(cli, mask=mask, turn=turn, shown=shown)
    z0_hat = step.z0_hat.detach().requires_grad_()
    term = penalty.compute(step._replace(z0_hat=z0_hat))["identity"]
    term.backward()
    assert step.batch.edit is not None and z0_hat.grad is not None
    expected = 0.0
    for i in range(3, 12):
        drawn = cli.model.codec.vae.decode(z0_hat[i : i + 1].detach() / 0.5 + 0.3).sample
        a, b = features.cls(drawn)[0].double(), features.cls(step.batch.edit.source[i : i + 1])[0].double()
        cosine = float((a * b).sum() / (a.norm() * b.norm()))
        expected += min(float(cli.model.diffusion.snr(step.timesteps)[i]), 5.0) * (1 - cosine) / 9
    assert term.item() == pytest.approx(0.5 * expected, rel=1e-3)
    assert z0_hat.grad.abs().sum(dim=(1, 2, 3)).ne(0).tolist() == [False] * 3 + [True] * 9


def test_no_weight_of_the_identity_model_is_in_a_checkpoint(run: tuple[LightningCLI, Path], dino: str) -> None:
    path = next(Path(run[1]).rglob("last.ckpt"))
    names = json.dumps(list(torch.load(path, weights_only=True)["state_dict"]))
    assert "encoder.projector" in names and "dino" not in names and "attention.query" not in names
    assert path.stat().st_size < 2_000_000


def test_the_composite_target_is_what_is_noised(run: tuple[LightningCLI, Path]) -> None:
    cli, penalty = run[0], penalty_of(run[0])
    with torch.no_grad():
        plain = a_step(cli)
        penalty.composite_target = True
        mixed = a_step(cli)
        penalty.composite_target = False
    assert plain.source is not None and plain.batch.edit is not None
    mask = touched(plain.batch.edit.mask, (8, 8))
    torch.testing.assert_close(mixed.z0, mask * plain.z0 + (1 - mask) * plain.source)
    torch.testing.assert_close(mixed.z_t, cli.model.diffusion.add_noise(mixed.z0, plain.noise, plain.timesteps))
    assert not torch.allclose(mixed.z0, plain.z0, atol=1e-3)


def test_samples_that_are_no_edit_add_nothing(run: tuple[LightningCLI, Path]) -> None:
    cli, _ = run
    step = cli.model.denoising_step(a_batch(cli)._replace(edit=None))
    terms = penalty_of(cli).compute(step)
    assert set(terms) == set(TERMS) and not any(term.item() for term in terms.values())
    assert all(term.requires_grad for term in terms.values())


def test_data_without_edits_are_refused(run: tuple[LightningCLI, Path]) -> None:
    cli, batch = run[0], a_batch(run[0])
    cli.model.train()
    with torch.no_grad():
        none, some = cli.model.denoising_step(batch._replace(edit=None)), cli.model.denoising_step(batch)
    fresh, seen = ConsistencyPenalty(), ConsistencyPenalty()
    for penalty in (fresh, seen):
        penalty.setup(cli.trainer, cli.model, "fit")
        for _ in range(5):  # of twelve samples
            penalty.compute(none)
    with pytest.raises(ValueError, match="^ConsistencyPenalty: none of the first 72 samples is an edit; data: EditDataModule reads edits$"):
        fresh.compute(none)
    seen.compute(some)  # one edit is enough
    assert all("spatial" in seen.compute(none) for _ in range(6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConsistencyPenalty(identity=0.1), "identity needs an identity_model"),
        (lambda: ConsistencyPenalty(identity=LinearSchedule(0, 1, 5)), "identity needs an identity_model"),
        (lambda: ConsistencyPenalty(turns=-1), "turns must be 0 or more, not -1"),
        (lambda: ConsistencyPenalty(cap=0), "cap must be above 0"),
        (lambda: ConsistencyPenalty(cap=-1), "cap must be above 0"),
        (lambda: ConsistencyPenalty(floor=6), r"floor in \[0, cap\], not 5.0 and 6"),
        (lambda: ConsistencyPenalty(global_share=1.0), "global_share must be in"),
        (lambda: LinearSchedule(0, 1, 0), "steps must be 1 or more"),
    ],
)
def test_settings_out_of_their_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)

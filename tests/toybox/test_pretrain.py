from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL

from lightning_mmgen.batch import pack
from lightning_mmgen.cli import main
from lightning_mmgen.data.images import pixels
from lightning_mmgen.models.weights import TOYBOX
from lightning_mmgen.toybox.pretrain import Pictures, whiten
from lightning_mmgen.toybox.pretrain_vlm import ALONE, FACTS, UNSEEN, Shown, VLMPretraining, measures, names, toys_alone, toys_in_scenes
from lightning_mmgen.toybox.tasks import TASKS
from lightning_mmgen.toybox.truth import boxes
from lightning_mmgen.toybox.world import COLOURS, SHAPES, STYLES, TEXTURES, TRAITS, Placed, Toy


def test_whitened_latents_have_unit_covariance_and_decode_to_the_same_pictures() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(TOYBOX / "vae", torch_dtype=torch.float32)
    with torch.no_grad():  # latents of very different sizes, correlated, and off zero
        mix = torch.randn(16, 16) * torch.logspace(-0.5, 0.5, 16)[:, None]
        vae.quant_conv.weight[:16, :, 0, 0] = mix @ vae.quant_conv.weight[:16, :, 0, 0]
        vae.quant_conv.bias[:16] = mix @ vae.quant_conv.bias[:16] + 3
        vae.post_quant_conv.weight[:, :, 0, 0] = vae.post_quant_conv.weight[:, :, 0, 0] @ mix.inverse()
        data = Pictures(64)
        pixels = torch.stack([data[i] for i in range(64)])
        before = vae.decode(vae.encode(pixels[:4]).latent_dist.mean).sample
        whiten(vae, pixels, floor=0.0)
        posterior = vae.encode(pixels).latent_dist
        after = vae.decode(posterior.mean[:4]).sample
    z = posterior.mean.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(torch.cov(z.T), torch.eye(16), atol=0.02, rtol=0)
    assert z.mean(0).abs().max() < 0.01 and vae.config.scaling_factor == 1.0
    torch.testing.assert_close(after, before, atol=1e-3, rtol=0)


def test_a_direction_that_hardly_varies_is_scaled_to_the_floor_only() -> None:
    vae = AutoencoderKL.from_pretrained(TOYBOX / "vae", torch_dtype=torch.float32)
    with torch.no_grad():
        vae.quant_conv.weight[3] *= 1e-4
        data = Pictures(16)
        pixels = torch.stack([data[i] for i in range(16)])
        whiten(vae, pixels, floor=0.1)
        z = vae.encode(pixels).latent_dist.mean.movedim(1, -1).flatten(0, -2)
    spread = torch.linalg.eigvalsh(torch.cov(z.T)).clamp(min=0).sqrt()
    assert spread[0] < 0.01 and spread[-1] == pytest.approx(1.0, abs=0.02)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    experiment = Path(__file__).parents[2] / "experiments/toybox/vlm.yaml"
    return yaml.safe_load(experiment.read_text())["model"]["init_args"] | {"out": str(tmp_path), "start": "toybox/vlm"}


@pytest.fixture
def vlm(settings: dict[str, Any]) -> VLMPretraining:
    return VLMPretraining(**settings)


def test_telling_is_the_plain_sum_of_its_terms(settings: dict[str, Any]) -> None:
    vlm = VLMPretraining(**settings | {"emphasis": {"hue": 6.0}})
    toys = [Toy("star", "red", "striped", 10.0, 1.7, 0.15, 0.0, 0.25), Toy("ring", "pink", "solid", -20.0, 2.2, 0.1, 0.11, 0.0)]
    measured = [  # five traits, then red, green and blue; a solid toy shows neither pitch nor phase
        [0.5, 0.0, 1.0, -1.0, 1.0, 0.9, -0.715 + 1.615 / 6, -0.715],
        [-1.0, None, None, 1.0, 0.0, 0.9 - 1.615 / 3, -0.715, 0.9],
    ]
    tokens, vlm.noise = torch.randn(2, 3, vlm.facts.in_features), 0.0
    which = torch.tensor([0, 0, 0, 1, 1, 1])
    expected: Any = 0.0
    squares: list[list[Any]] = [[] for _ in range(8)]
    styles = ["pastel", "flat"]
    for toy, style, numbers, patches in zip(toys, styles, measured, tokens, strict=True):
        for told in vlm.facts(patches):
            shape, colour, texture, look, _, values = told.split(FACTS)
            expected -= shape.log_softmax(0)[SHAPES.index(toy.shape)] / 6
            expected -= colour.log_softmax(0)[list(COLOURS).index(toy.colour)] / 6
            expected -= texture.log_softmax(0)[TEXTURES.index(toy.texture)] / 6
            expected -= look.log_softmax(0)[STYLES.index(style)] / 6
            for k, (value, number) in enumerate(zip(values, numbers, strict=True)):
                squares[k] += [] if number is None else [(value - number) ** 2]
    means = [torch.stack(square).mean() for square in squares]
    looks = [names(Placed(t, "small", 0, 0), style, ALONE) for t, style in zip(toys, styles, strict=True)]
    shown = Shown(tokens.flatten(0, 1), which, torch.tensor(looks), torch.tensor([measures(t) for t in toys]))
    torch.testing.assert_close(vlm.telling(shown), expected + 6 * means[0] + sum(means[1:]))
    vlm.noise = 1.0
    assert vlm.telling(shown) != vlm.telling(shown)


def test_the_tokens_of_a_toys_own_picture_are_told(vlm: VLMPretraining) -> None:
    rng = np.random.default_rng(0)
    records = [TASKS[task](rng, False) for task in ("caption", "naming", "question", "measuring")]
    side = vlm.encoder.patch_size * 5
    pictures = [[pixels(ref.image, side) for ref in r.references] for r in records]
    markers = [[reference.marker for reference in r.references] for r in records]
    prompts = vlm.encoder.embed([r.prompt().instruction for r in records], markers, pack(pictures))
    shown = toys_alone(records, prompts)
    assert shown is not None
    portraits = [p for r, row in zip(records, pictures, strict=True) if r.task in ("naming", "measuring") for p in row]
    torch.testing.assert_close(shown.tokens, vlm.encoder.embed_images(torch.stack(portraits)).flatten(0, 1))
    assert shown.which.tolist() == [k for k in range(len(portraits)) for _ in range(25)]
    placed = [(p, records[i].extra["truth"].scene.style) for i in (1, 3) for p in records[i].extra["truth"].scene.toys]
    assert shown.names.tolist() == [names(p, style, ALONE) for p, style in placed] and (shown.names[:, -1] == UNSEEN).all()
    torch.testing.assert_close(shown.measures, torch.tensor([measures(p.toy) for p, _ in placed]), equal_nan=True)
    assert toys_alone([records[0], records[2]], prompts) is None


def test_tokens_of_a_whole_scene_are_told_where_its_toys_are(vlm: VLMPretraining) -> None:
    rng = np.random.default_rng(1)
    records = [TASKS[task](rng, False) for task in ("naming", "question", "question", "control")]
    pictures = [[pixels(ref.image, 64) for ref in r.references] for r in records]
    markers = [[reference.marker for reference in r.references] for r in records]
    prompts = vlm.encoder.embed([r.prompt().instruction for r in records], markers, pack(pictures))
    shown = toys_in_scenes(records, prompts)
    assert shown is not None
    scenes = [r.extra["truth"].scene for r in records[1:]]
    placed = [(p, scene.style) for scene in scenes for p in scene.toys]
    whole = len(placed) - len(scenes[-1].toys)  # of the control picture shapes, sizes and proportions alone are seen
    assert shown.names[:whole].tolist() == [names(*both) for both in placed[:whole]] and (shown.names[:whole] >= 0).all()
    assert [row[1:4] for row in shown.names[whole:].tolist()] == [[UNSEEN] * 3] * len(scenes[-1].toys)
    assert [[row[0], row[4]] for row in shown.names[whole:].tolist()] == [[names(*p)[0], names(*p)[4]] for p in placed[whole:]]
    assert shown.measures[whole:].isfinite().nonzero()[:, 1].unique().tolist() == [list(TRAITS).index("aspect")]
    grids = [vlm.encoder.embed_images(row[0][None])[0].unflatten(0, (8, 8)) for row in pictures[1:]]
    at = 0
    for grid, scene, record in zip(grids, scenes, records[1:], strict=True):
        for box in boxes(scene):
            inside = [
                (row, column)
                for row in range(8)
                for column in range(8)
                if box.top - 1 < 8 * row + 4 < box.bottom + 1 and box.left - 1 < 8 * column + 4 < box.right + 1
            ]
            own = shown.which == at
            assert own.sum() == len(inside) > 0, record.question
            torch.testing.assert_close(shown.tokens[own], torch.stack([grid[r, c] for r, c in inside]))
            at += 1
    assert at == len(shown.names) and toys_in_scenes(records[:1], prompts) is None


def test_the_language_model_stays_where_only_the_eyes_are_trained(settings: dict[str, Any]) -> None:
    eyes = VLMPretraining(**settings | {"train_language": False})
    trained = {n.split(".")[1] for n, p in eyes.net.named_parameters() if p.requires_grad}
    assert trained == {"vision_model", "connector"}


def test_steps_between_those_with_the_language_loss_see_pictures_alone(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = VLMPretraining(**settings | {"language_every": 2, "noise": 1e-6, "reference_sizes": [40], "scene_sizes": [64]})
    logged: dict[str, Any] = {}
    monkeypatch.setattr(vlm, "log_dict", lambda values, **_: logged.update(values))
    monkeypatch.setattr(vlm, "log", lambda *_, **__: None)
    rng = np.random.default_rng(0)
    records = [TASKS[task](rng, False) for task in ("caption", "naming", "question", "measuring")]
    between = vlm.training_step(records, 1)
    assert between is not None and set(logged) == {"loss/telling", "loss/telling_scenes"}
    torch.testing.assert_close(between, vlm.training_step(records[1:], 3), rtol=1e-4, atol=1e-4)
    between.backward()
    assert all(p.grad is None for p in vlm.net.lm_head.parameters()) and vlm.facts.weight.grad is not None
    assert vlm.training_step(records[:1], 1) is None  # no picture
    spoken = vlm.training_step(records, 2)
    assert spoken is not None and set(logged) == {"loss/telling", "loss/telling_scenes", "loss/language"}
    torch.testing.assert_close(spoken, between + logged["loss/language"], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="nothing to learn without noise and pictures"):
        VLMPretraining(**settings | {"language_every": 2, "noise": 0.0})


DECODER = Path(__file__).parents[2] / "experiments/toybox/decoder.yaml"


def test_latents_are_drawn_as_the_sampler_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    training = main(["-c", str(DECODER), "--model.init_args.first=7"], run=False).model
    training.configure_model()
    captions = ["a red striped star in the centre on a white background", "a blue solid ring at the top on a pink background"]
    z_0 = torch.randn(2, 16, 8, 8)
    torch.manual_seed(3)
    drawn = training.drawn(captions, z_0)
    torch.manual_seed(3)
    place, noise = int(torch.randint(7, 10, ())), torch.randn_like(z_0)
    pipeline = training.pipeline
    pipeline.scheduler.set_timesteps(10)
    assert place < 9  # more than one step is left
    condition = pipeline.encode(captions, [[], []], [])
    empty = pipeline.encode(["", ""], [[], []], [])
    z = pipeline.scheduler.add_noise(z_0, noise, pipeline.scheduler.timesteps[place].expand(2))
    for t in pipeline.scheduler.timesteps[place:]:
        with torch.no_grad():
            given, none = (training.base(z, t.expand(2), c, (64, 64)) for c in (condition, empty))
        z = pipeline.scheduler.step(none + 2.0 * (given - none), t, z).prev_sample
    torch.testing.assert_close(drawn, z, rtol=1e-4, atol=1e-4)


def test_a_decoder_learns_and_its_encoder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--trainer.max_steps=2", "--model.init_args.batch_size=2", "--model.init_args.plain=1", "--trainer.enable_progress_bar=false"]
    main(["fit", "-c", str(DECODER), *few])
    before = AutoencoderKL.from_pretrained(TOYBOX / "vae", torch_dtype=torch.float32).state_dict()
    after = AutoencoderKL.from_pretrained("runs/toybox/decoder", torch_dtype=torch.float32).state_dict()
    moved = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"decoder", "post_quant_conv"}

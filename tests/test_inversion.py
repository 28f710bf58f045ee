from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor

from lightning_mmgen.build.generators import Generator, open_generator
from lightning_mmgen.data.images import pixels
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.diffusion import Diffusion
from lightning_mmgen.inversion import Predict, PredictEmpty, Way, invert, sample_back

PROCESSES = [Diffusion(), Diffusion("v_prediction", zero_terminal_snr=True)]


@pytest.mark.parametrize("process", PROCESSES, ids=["epsilon", "v"])
def test_every_step_is_ddims(process: Diffusion) -> None:
    ddim: Any = DDIMScheduler(**process.scheduler_config())
    ddim.set_timesteps(10)
    way, z, prediction = Way.of(ddim, 10), torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    assert way.timesteps == ddim.timesteps.tolist()
    for place, t in enumerate(way.timesteps):
        torch.testing.assert_close(way.step(prediction, z, place), ddim.step(prediction, t, z).prev_sample)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_inversion_is_that_of_diffusers(spacing: str) -> None:
    config = {**Diffusion().scheduler_config(), "timestep_spacing": spacing, "steps_offset": int(spacing == "leading")}
    inverse: Any = DDIMInverseScheduler(**config)
    inverse.set_timesteps(10)
    z = z_0 = torch.randn(1, 4, 3, 3)
    for t in inverse.timesteps:
        z = inverse.step(_sine(z, int(t)), int(t), z).prev_sample
    torch.testing.assert_close(invert(_sine, z_0, Way.of(DDIMScheduler(**config), 10))[0], z)


def _sine(z: Tensor, t: int) -> Tensor:
    return torch.sin(z + t / 100)


def test_sampling_returns_where_it_came_from_if_noise_is_constant() -> None:
    way, z_0, noise = Way.of(DDIMScheduler(**Diffusion().scheduler_config()), 7), torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    pivots = invert(lambda z, t: noise, z_0, way)
    assert len(pivots) == 8 and pivots[-1] is z_0
    returned = sample_back(lambda z, t: noise, lambda z, t, tokens: noise, torch.zeros(2, 1, 3), pivots, way, 3.0, inner_steps=0)
    torch.testing.assert_close(returned.z_0, z_0, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def toybox() -> Generator:
    return open_generator("toybox")


@pytest.fixture(scope="module")
def asked(toybox: Generator) -> tuple[Predict, PredictEmpty, Tensor, Tensor]:
    """The UNet under the captions of two toybox pictures and without them, the empty tokens, and the pictures' latents."""
    records = list(ToyboxSource({"caption": 1.0}, length=2))
    given, one = toybox.read([r.caption or "" for r in records]), toybox.empty()
    assert one.pooled is not None

    def predict_empty(z: Tensor, t: int, tokens: Tensor) -> Tensor:
        b = len(z)
        return toybox.predict(z, t, one._replace(tokens=tokens, mask=one.mask.expand(b, -1), pooled=one.pooled.expand(b, -1)))  # type: ignore[union-attr]

    z_0 = toybox.codec.encode(torch.stack([pixels(r.target) for r in records if r.target is not None]))
    return lambda z, t: toybox.predict(z, t, given), predict_empty, one.tokens.expand(2, -1, -1), z_0


def psnr(toybox: Generator, a: Tensor, b: Tensor) -> float:
    """Of decoded latents, whose range is 2, in dB: the mean over pictures."""
    error = (toybox.codec.decode(a) - toybox.codec.decode(b)).square().mean((1, 2, 3))
    return float((10 * (4 / error).log10()).mean())


def test_pictures_return_and_null_text_optimisation_brings_guided_ones_nearer(
    toybox: Generator, asked: tuple[Predict, PredictEmpty, Tensor, Tensor]
) -> None:
    predict, predict_empty, empty, z_0 = asked
    way = Way.of(toybox.scheduler, 5)
    pivots = invert(predict, z_0, way)

    def returned(scale: float, inner_steps: int) -> float:
        back = sample_back(predict, predict_empty, empty, pivots, way, scale, inner_steps, toybox.rate)
        assert len(back.empty) == 5
        return psnr(toybox, back.z_0, z_0)

    alone, guided, led = returned(1.0, 0), returned(3.0, 0), returned(3.0, 2)
    assert alone > 25 and alone > guided, (alone, guided)
    assert led > guided + 1, (guided, led)


def test_each_picture_of_a_batch_is_optimised_for_itself(toybox: Generator, asked: tuple[Predict, PredictEmpty, Tensor, Tensor]) -> None:
    _, predict_empty, empty, z_0 = asked
    way = Way.of(toybox.scheduler, 2)
    pivots = invert(_sine, z_0, way)
    together = sample_back(_sine, predict_empty, empty, pivots, way, 3.0, 2)
    alone = sample_back(_sine, predict_empty, empty[:1], [z[1:2] for z in pivots], way, 3.0, 2)
    torch.testing.assert_close(together.z_0[1:2], alone.z_0, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together.empty[-1][0], together.empty[-1][1])


def test_another_prediction_or_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type must be epsilon or v_prediction, not 'sample'"):
        Way.of(DDIMScheduler(prediction_type="sample"), 10)
    with pytest.raises(ValueError, match="steps must be 1 to 1000, not 1001"):
        Way.of(DDIMScheduler(), 1001)

"""A picture's way back to noise: DDIM inversion, and null-text optimisation, which makes guided sampling return (Mokady et al. 2022).

Places along the way count from 0, the noisiest, to T, the picture's latents; at place i < T the UNet is asked at ``timesteps[i]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .diffusion import guide

Predict = Callable[[Tensor, int], Tensor]
"""The UNet's prediction [b, c, h, w] for latents z_t [b, c, h, w] at a timestep, under a prompt."""
PredictEmpty = Callable[[Tensor, int, Tensor], Tensor]
"""The same with tokens [b, n, d] in the place of the empty prompt's."""


class Way(NamedTuple):
    """The noise levels that DDIM passes, from noise to picture.

    Attributes:
        timesteps: T of them, falling.
        abar: [T + 1], of each place.
        prediction_type: ``epsilon`` or ``v_prediction``.
    """

    timesteps: list[int]
    abar: Tensor
    prediction_type: str

    @classmethod
    def of(cls, scheduler: Any, steps: int) -> Way:
        """The way of DDIM with so many steps through the process of any scheduler of ``diffusers``.

        Raises:
            ValueError: a prediction of another type, or a number of steps that the process does not have.
        """
        ddim: Any = DDIMScheduler.from_config(scheduler.config)
        if (kind := ddim.config.prediction_type) not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type must be epsilon or v_prediction, not {kind!r}")
        if not 1 <= steps <= ddim.config.num_train_timesteps:
            raise ValueError(f"steps must be 1 to {ddim.config.num_train_timesteps}, not {steps}")
        ddim.set_timesteps(steps)
        return cls(ddim.timesteps.tolist(), torch.cat([ddim.alphas_cumprod[ddim.timesteps], ddim.final_alpha_cumprod[None]]), kind)

    def step(self, prediction: Tensor, z: Tensor, place: int) -> Tensor:
        """Latents at a place taken to the next along a prediction (Song et al. 2021, equation 12, eta 0)."""
        a, noise = self.abar[place], self.noise(prediction, z, place)
        z_0 = (z - (1 - a).sqrt() * noise) / a.sqrt() if self.prediction_type == "epsilon" else a.sqrt() * z - (1 - a).sqrt() * prediction
        return self.mixed(z_0, noise, place + 1)

    def step_back(self, prediction: Tensor, z: Tensor, place: int) -> Tensor:
        """Latents at the next place taken to this one, as if its prediction were the same there."""
        b, noise = self.abar[place + 1], self.noise(prediction, z, place)
        return self.mixed((z - (1 - b).sqrt() * noise) / b.sqrt(), noise, place)

    def noise(self, prediction: Tensor, z: Tensor, place: int) -> Tensor:
        """The noise that a prediction at a place says there is."""
        a = self.abar[place]
        return prediction if self.prediction_type == "epsilon" else a.sqrt() * prediction + (1 - a).sqrt() * z

    def mixed(self, z_0: Tensor, noise: Tensor, place: int) -> Tensor:
        """z_t at a place."""
        return self.abar[place].sqrt() * z_0 + (1 - self.abar[place]).sqrt() * noise


@torch.no_grad()
def invert(predict: Predict, z_0: Tensor, way: Way) -> list[Tensor]:
    """Latents at every place, noisiest first, that lead to ``z_0`` at guidance 1: DDIM backwards, the noise of each step taken as if it did
    not change along it (Mokady et al. 2022, section 3.1; the UNet is asked at the timestep that the step goes to, as in their code)."""
    z = [z_0]
    for i in reversed(range(len(way.timesteps))):
        z.append(way.step_back(predict(z[-1], way.timesteps[i]), z[-1], i))
    return z[::-1]


class Returned(NamedTuple):
    """What guided sampling from the noisiest place arrives at, latents [b, c, h, w], and the tokens [b, n, d] that stood for the empty
    prompt at each step."""

    z_0: Tensor
    empty: list[Tensor]


def sample_back(
    predict: Predict,
    predict_empty: PredictEmpty,
    empty: Tensor,
    pivots: list[Tensor],
    way: Way,
    scale: float,
    inner_steps: int = 5,
    rate: float = 1e-2,
) -> Returned:
    """Guided sampling that is led back to where the inversion came from (Mokady et al. 2022, algorithm 1): at every step the empty prompt's
    tokens, which begin as the last step's, are optimised so that the step ends near the inversion's latents.

    Args:
        predict: under the prompt; it is asked once a step.
        empty: [b, n, d], tokens of the empty prompt.
        pivots: what :func:`invert` gave.
        scale: of the guidance, 7.5 in the paper.
        inner_steps: of Adam at each step, anew, with a rate that falls to half over the way; none is plain sampling. Each sample of the
            batch is optimised for itself.
        rate: 0.01 in the paper's code.
    """
    z, used = pivots[0], []
    for i, t in enumerate(way.timesteps):
        with torch.no_grad():
            given = predict(z, t)
        if inner_steps:
            empty = empty.detach().clone().requires_grad_()
            adam = torch.optim.Adam([empty], lr=rate * (1 - i / (2 * len(way.timesteps))))
            for _ in range(inner_steps):
                arrived = way.step(guide(predict_empty(z, t, empty), given, scale=scale), z, i)
                loss = (arrived - pivots[i + 1]).square().mean((1, 2, 3)).sum()
                (empty.grad,) = torch.autograd.grad(loss, [empty])
                adam.step()
            empty = empty.detach()
        with torch.no_grad():
            z = way.step(guide(predict_empty(z, t, empty), given, scale=scale), z, i)
        used.append(empty)
    return Returned(z, used)

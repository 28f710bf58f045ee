"""The diffusion process: noise schedule, prediction types, SNR weights, the estimate of z_0, guidance rules, and condition dropout.

Notation:
``z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps``; SNR(t) = abar_t / (1 - abar_t); ``v = sqrt(abar_t) eps - sqrt(1 - abar_t) z_0``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from .batch import Batch
from .prompt import without_markers


@dataclass
class Diffusion:
    """Schedule and training target.

    Args:
        prediction_type: ``epsilon`` (SDXL, SD1.5) or ``v_prediction`` (Salimans & Ho 2022, section 4).
        beta_schedule: as in ``diffusers``: ``scaled_linear`` (Stable Diffusion), ``linear`` or ``squaredcos_cap_v2`` (cosine).
        beta_start, beta_end: range of the linear schedules.
        train_timesteps: number of timesteps.
        zero_terminal_snr: rescale the schedule so that the last step is pure noise (Lin et al. 2023, algorithm 1).
        snr_gamma: min-SNR weights (Hang et al. 2023, equation 9), 5 in the paper; none by default.
        offset_noise: standard deviation of a per-channel offset of the noise, in its own units; 0 is off.
        timestep_sampling: of training: ``uniform``, or ``cubic``, mostly noisy timesteps, where a condition decides the most
            (T2I-Adapter, Mou et al. 2023, section 3.3).
    """

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    beta_schedule: Literal["scaled_linear", "linear", "squaredcos_cap_v2"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    train_timesteps: int = 1000
    zero_terminal_snr: bool = False
    snr_gamma: float | None = None
    offset_noise: float = 0.0
    timestep_sampling: Literal["uniform", "cubic"] = "uniform"

    def __post_init__(self) -> None:
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError("zero_terminal_snr needs prediction_type: v_prediction (at SNR 0 epsilon says nothing about z_0)")
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise ValueError(f"snr_gamma must be positive, not {self.snr_gamma}")

    def scheduler_config(self) -> dict[str, Any]:
        """The same process for a scheduler of ``diffusers``; sampling uses trailing timesteps, so that it starts at the last one."""
        return {
            "num_train_timesteps": self.train_timesteps,
            "beta_schedule": self.beta_schedule,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "prediction_type": self.prediction_type,
            "rescale_betas_zero_snr": self.zero_terminal_snr,
            "timestep_spacing": "trailing",
            "clip_sample": False,
        }

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """abar_t, [train_timesteps], float32."""
        from diffusers import DDPMScheduler

        abar = DDPMScheduler(**self.scheduler_config()).alphas_cumprod.clone()
        if self.zero_terminal_snr:
            abar[-1] = 0.0  # the rescaling leaves rounding there
        return abar

    def sample_timestep(self, generator: torch.Generator) -> Tensor:
        """One timestep of training, a scalar: t, or floor((1 - ((t + 1/2) / T)^3) T) (cubic), of a uniform t in 0..T-1."""
        t = torch.randint(self.train_timesteps, (), generator=generator)
        if self.timestep_sampling == "uniform":
            return t
        return ((1 - ((t.double() + 0.5) / self.train_timesteps) ** 3) * self.train_timesteps).long()

    def at(self, timesteps: Tensor) -> Tensor:
        """abar at ``timesteps`` [b] -> [b, 1, 1, 1]."""
        return self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio, [b] -> [b]."""
        abar = self.at(timesteps).flatten()
        return abar / (1 - abar)

    def add_noise(self, z0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t of clean latents, [b, c, h, w]."""
        abar = self.at(timesteps)
        return abar.sqrt() * z0 + (1 - abar).sqrt() * noise

    def target(self, z0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet is to predict, [b, c, h, w]."""
        if self.prediction_type == "epsilon":
            return noise
        abar = self.at(timesteps)
        return abar.sqrt() * noise - (1 - abar).sqrt() * z0

    def estimate_z0(self, prediction: Tensor, z_t: Tensor, timesteps: Tensor) -> Tensor:
        """The estimate of z_0 that a prediction implies, [b, c, h, w]."""
        abar = self.at(timesteps)
        if self.prediction_type == "epsilon":
            return (z_t - (1 - abar).sqrt() * prediction) / abar.sqrt()
        return abar.sqrt() * z_t - (1 - abar).sqrt() * prediction

    def weight(self, timesteps: Tensor) -> Tensor:
        """Loss weight, [b] -> [b]: 1, or min(SNR, gamma) over SNR (epsilon) or SNR + 1 (v).

        With zero terminal SNR the last timestep's min-SNR weight is 0: leave ``snr_gamma`` out if it must be learned.
        """
        if self.snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = self.snr(timesteps)
        return snr.clamp(max=self.snr_gamma) / (snr if self.prediction_type == "epsilon" else snr + 1)


GuidanceRule = Literal["constant", "alternating"]


def guided_at(step: int, rule: GuidanceRule) -> bool:
    """Whether a sampling step, counted from 0, is guided: every one (``constant``), or the even ones (``alternating``; Instruct-Imagen,
    appendix: scale 25 and none on consecutive steps)."""
    return rule == "constant" or step % 2 == 0


def guide(empty: Tensor, *given: Tensor, scale: float, image_scale: float | None = None) -> Tensor:
    """Classifier-free guidance of predictions [b, c, h, w] without and with the condition (Ho & Salimans 2022).

    Args:
        given: with the whole condition; or with its pictures alone, then with all of it, each guided by a scale of its own:
            e + s_I (e_I - e) + s_T (e_IT - e_I) (InstructPix2Pix, Brooks et al. 2023, equation 3).
        scale, image_scale: s_T and s_I.
    """
    *shown, full = given
    if not shown:
        return empty + scale * (full - empty)
    assert image_scale is not None
    return empty + image_scale * (shown[0] - empty) + scale * (full - shown[0])


@dataclass
class ConditionDropout:
    """Probabilities of training without a part of the prompt; what guidance needs. They exclude one another.

    Args:
        both: nothing is left but an empty prompt.
        text: only the pictures are left.
        references: only the text is left, without the captions of retrieved neighbours (Instruct-Imagen, section 3.2: drop the
            context only).
    """

    both: float = 0.1
    text: float = 0.0
    references: float = 0.0

    def __post_init__(self) -> None:
        shares = (self.both, self.text, self.references)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"condition_dropout: shares must be 0 or more and sum to at most 1, not {shares}")


def drop_condition(batch: Batch, dropout: ConditionDropout, draws: Tensor) -> Batch:
    """Drop parts of the prompts.

    Args:
        draws: [b] uniform numbers in [0, 1), one a sample.

    Returns:
        The batch with the texts, markers and pictures that are left; the target stays.
    """
    instructions, markers, phrases, keep = [], [], [], []
    bare = batch.bare or [without_markers(text) for text in batch.instructions]
    named = batch.phrases or [[""] * len(marks) for marks in batch.markers]
    for text, alone, marks, names, u in zip(batch.instructions, bare, batch.markers, named, draws.tolist(), strict=True):
        no_text = u < dropout.both + dropout.text
        no_references = u < dropout.both or dropout.both + dropout.text <= u < dropout.both + dropout.text + dropout.references
        if no_text:
            text, names = "".join(f"[ref#{k}]" for k in marks), [""] * len(marks)
        if no_references:
            text, marks, names = "" if no_text else alone, [], []
        instructions.append(text)
        markers.append(marks)
        phrases.append(names)
        keep.append(not no_references)
    kept = torch.tensor(keep)
    references = []
    for group in batch.references:
        rows = kept.to(group.sample.device)[group.sample]
        if rows.any():
            references.append(group.take(rows))
    edit = batch.edit and batch.edit._replace(shown=batch.edit.shown & kept.to(batch.edit.shown.device))
    return batch._replace(instructions=instructions, markers=markers, references=references, phrases=phrases, edit=edit)

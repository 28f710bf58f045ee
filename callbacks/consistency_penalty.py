"""The consistency penalty as terms of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from lightning_mmgen.batch import Batch, Edit
from lightning_mmgen.losses import (
    DenoisingStep,
    LinearSchedule,
    LossTerm,
    composite,
    counted_mean,
    earlier,
    identity,
    latent_mask,
    outside,
    snr_weight,
    spatial,
    temporal,
    touched,
    turns,
)
from lightning_mmgen.models.dino import Dino

from .ema import averaged
from .teacher import taught

if TYPE_CHECKING:
    from lightning_mmgen.module import MultimodalDiffusion

PATIENCE = 64
"""Samples without an edit, from the first one on, after which the data are taken to have none."""


class ConsistencyPenalty(LossTerm):
    """Asks an edit to leave alone what lies outside its mask, and an edit of all of the picture to leave its objects what they are.

    Each term has a weight, a number or a schedule, and where that is 0 it is neither computed nor logged. Its share of the loss is logged
    under its name. Definitions: :mod:`lightning_mmgen.losses.consistency`. Masks go to latent size by area. A latent on a mask's rim stands
    for a patch of which a part changes, and is asked to be the target's; all others are asked to be the source's. Samples that are no edit
    add nothing. The least penalty is that of a copy of the source: look at edit success beside drift.

    Args:
        weight: factor of all terms.
        spatial: the estimate of z_0 against the source, outside the mask.
        temporal: against the estimate at an earlier timestep t' < t of the same noise, by the averaged weights if an :class:`EMA` is on and
            else by the current ones, without dropout; one more forward pass. t' is uniform below t, from the sample's own seed.
        pixels: as ``spatial``, but the decoded estimate against the source's pixels: a mask's rim is not rounded to latents, and what the
            VAE makes of one latent in its neighbours' patches counts. The gradient goes through the VAE's decoder; estimates whose w(t) is
            under 1 % of ``cap``, and those of edits of all of the picture, are not decoded.
        turns: as ``spatial``, over the later turns of multi-turn edits alone.
        identity: 1 - cos of DINO's class tokens of source and decoded estimate, over the edits whose mask covers more than
            ``global_share`` of the picture and whose source the model sees; w(t) weighs it as the others, else the noisiest estimates,
            which show nothing, would count most. The gradient goes through the VAE's decoder.
        composite_target: learn the target within the mask and the source outside it, for pairs that drift themselves.
        cap: of w(t) = min(SNR, cap).
        floor: the least w(t). min(SNR, cap) hardly asks about the noisy timesteps, and of few sampling steps most are noisy.
        identity_model: any DINO of ``transformers``, by hub name or folder.
        global_share: of the picture's area.

    Raises:
        ValueError: a weight, cap or share out of its range; ``identity`` without a model; none of the first samples is an edit.
    """

    def __init__(
        self,
        weight: float = 1.0,
        spatial: float | LinearSchedule = 1.0,
        temporal: float | LinearSchedule = 0.0,
        pixels: float | LinearSchedule = 0.0,
        turns: float | LinearSchedule = 0.0,
        identity: float | LinearSchedule = 0.0,
        composite_target: bool = False,
        cap: float = 5.0,
        floor: float = 0.0,
        identity_model: str | None = None,
        global_share: float = 0.95,
    ) -> None:
        super().__init__(weight)
        terms = {"spatial": spatial, "temporal": temporal, "pixels": pixels, "turns": turns, "identity": identity}
        self.schedules = {
            name: value if isinstance(value, LinearSchedule) else LinearSchedule(value, value, 1) for name, value in terms.items()
        }
        for name, schedule in self.schedules.items():
            if min(schedule.start, schedule.end) < 0:
                raise ValueError(f"ConsistencyPenalty: {name} must be 0 or more, not {min(schedule.start, schedule.end)}")
        if not 0 <= floor <= cap or cap == 0:
            raise ValueError(f"ConsistencyPenalty: cap must be above 0 and floor in [0, cap], not {cap} and {floor}")
        if not 0 <= global_share < 1:
            raise ValueError(f"ConsistencyPenalty: global_share must be in [0, 1), not {global_share}")
        if max(self.schedules["identity"].start, self.schedules["identity"].end) > 0 and identity_model is None:
            raise ValueError("ConsistencyPenalty: identity needs an identity_model, a DINO by name or folder")
        self.composite_target, self.identity_model, self.global_share = composite_target, identity_model, global_share
        self.cap, self.floor = cap, floor
        self.dino: Dino | None = None
        self.without: int | None = 0  # samples so far, until the first edit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.trainer, self.module = trainer, cast("MultimodalDiffusion", pl_module)
        if self.identity_model is not None and self.dino is None:
            self.dino = Dino.from_pretrained(self.identity_model)

    def clean(self, batch: Batch, z0: Tensor, source: Tensor | None) -> Tensor:
        if not self.composite_target or source is None or batch.edit is None:
            return z0
        return composite(z0, source, touched(batch.edit.mask, _size(z0)))

    def compute(self, step: DenoisingStep) -> dict[str, Tensor]:
        weights = {name: schedule.at(self.trainer.global_step) for name, schedule in self.schedules.items()}
        if not any(weights.values()):
            return {}
        self._expect_edits(step.batch)
        edit, source = step.batch.edits, step.z0 if step.source is None else step.source
        mask, snr = latent_mask(edit.mask, _size(step.z0)), self.module.diffusion.snr(step.timesteps)
        weight = snr_weight(snr, self.cap, self.floor)
        kept = composite(step.z0, source, touched(edit.mask, _size(step.z0)))
        terms: dict[str, Callable[[], Tensor]] = {
            "spatial": lambda: spatial(step.z0_hat, kept, mask, weight),
            "temporal": lambda: temporal(step.z0_hat, self.teacher(step), mask, weight),
            "pixels": lambda: self.detail(step.z0_hat, edit, weight),
            "turns": lambda: turns(step.z0_hat, kept, mask, weight, edit.turn),
            "identity": lambda: self.likeness(step.z0_hat, edit, weight),
        }
        return {name: weights[name] * term() for name, term in terms.items() if weights[name]}

    def teacher(self, step: DenoisingStep) -> Tensor:
        """The estimate of z_0 at t', [b, c, h, w], by the averaged weights from the prompt on."""
        diffusion, ema = self.module.diffusion, averaged(self.trainer)
        timesteps = earlier(step.batch.seed, step.timesteps)
        z_t = diffusion.add_noise(step.z0, step.noise, timesteps)
        told = taught(self.module, ema.mean if ema else {}, step.batch, z_t, timesteps, step.condition.source)
        return diffusion.estimate_z0(told.prediction, z_t, timesteps)

    def detail(self, z0_hat: Tensor, edit: Edit, weight: Tensor) -> Tensor:
        """The term of pixels."""
        asked = (weight >= self.cap / 100) & (edit.mask < 1).flatten(1).any(1)
        rows, drawn = self.decoded(z0_hat, asked)
        each = outside(drawn - edit.source[rows], edit.mask[rows], weight[rows])
        return (each * asked[rows]).sum() / len(asked)

    def likeness(self, z0_hat: Tensor, edit: Edit, weight: Tensor) -> Tensor:
        """The identity term."""
        assert self.dino is not None
        dino = self.dino.to(z0_hat.device)
        asked = edit.visible & (edit.mask.mean(dim=(1, 2, 3)) > self.global_share)
        rows, drawn = self.decoded(z0_hat, asked)
        each = weight[rows] * identity(dino.cls(drawn), dino.cls(edit.source[rows]))
        return counted_mean(torch.zeros_like(weight).index_copy(0, rows, each), asked)

    def decoded(self, z0_hat: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """The samples that are asked about, and pictures of their estimates; one at least, as processes that gather the VAE's weights from
        each other decode together."""
        rows = asked.nonzero().flatten() if asked.any() else torch.zeros(1, dtype=torch.long, device=asked.device)
        return rows, self.module.codec.reconstruct(z0_hat[rows])

    def _expect_edits(self, batch: Batch) -> None:
        """Raises: ValueError: training has seen enough samples, and none was an edit."""
        if self.without is None or not self.module.training:
            return
        self.without = self.without + batch.size if batch.edit is None else None
        if self.without is not None and self.without >= PATIENCE:
            raise ValueError(f"ConsistencyPenalty: none of the first {self.without} samples is an edit; data: EditDataModule reads edits")


def _size(latents: Tensor) -> tuple[int, int]:
    return latents.shape[-2], latents.shape[-1]

"""The LightningModule: encoder, adapter and UNet, wired; the step; the optimizer from the parameter table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from .batch import Batch, Condition
from .checkpoint import AtomicCheckpointIO, trained_weights
from .conditioning import Conditioner
from .data.datamodule import MultimodalDataModule
from .diffusion import ConditionDropout, Diffusion, drop_condition
from .losses import DenoisingStep, LossTerm, diffusion_loss
from .models.adapter import AdapterConfig
from .models.codec import CodecConfig
from .models.encoder import Encoder
from .models.parameters import ParameterTable, Row
from .models.references import ReferenceAttentionConfig, give_partial_pass
from .models.unet import UNetConfig, denoise, pooled_features, takes_source
from .optimizer import beside_parameters, make_optimizer
from .pipeline import MultimodalPipeline, Sampler, without_words

PARTS = ("encoder", "adapter", "unet", "reference_attention")


@dataclass
class LRSchedule:
    """Factor on every row's rate, by optimizer step, whatever the number of devices and the accumulation.

    Args:
        warmup: optimizer steps of linear warm-up.
        decay: ``constant`` after the warm-up, or ``cosine`` or ``linear`` to ``floor`` at the trainer's ``max_steps``.
        floor: the factor at the end.
    """

    warmup: int = 0
    decay: Literal["constant", "cosine", "linear"] = "constant"
    floor: float = 0.0

    def factor(self, step: int, max_steps: int) -> float:
        """The factor at an optimizer step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        done = min((step - self.warmup) / max(max_steps - self.warmup, 1), 1.0)
        left = 1 - done if self.decay == "linear" else 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))
        return self.floor + (1 - self.floor) * left


class MultimodalDiffusion(L.LightningModule):
    """An image generator that follows multimodal instructions.

    Args:
        encoder: the vision-language model.
        adapter: size of the transformer between it and the UNet.
        unet: which diffusion UNet.
        codec: which VAE.
        parameters: the parameter table; every parameter falls under exactly one row.
        diffusion: schedule, prediction type, weights.
        condition_dropout: how often parts of the prompt are left out in training.
        schedule: warm-up and decay of all learning rates.
        sampler: how the callbacks draw pictures.
        betas: of AdamW; Adafactor takes the first.
        reference_attention: references through the UNet's own encoder (Instruct-Imagen), beside the VLM's or instead of it.
        start: a checkpoint whose trained weights a fit begins from, with a new optimizer and a new count of steps (MUMU's stage 2 after
            its stage 1); it has the same parameter table.
    """

    def __init__(
        self,
        encoder: Encoder,
        adapter: AdapterConfig,
        unet: UNetConfig,
        codec: CodecConfig,
        parameters: tuple[Row, ...],
        diffusion: Diffusion = Diffusion(),
        condition_dropout: ConditionDropout = ConditionDropout(),
        schedule: LRSchedule = LRSchedule(),
        sampler: Sampler = Sampler(),
        betas: tuple[float, float] = (0.9, 0.999),
        reference_attention: ReferenceAttentionConfig | None = None,
        start: str | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.parts = (adapter, unet, codec, reference_attention)
        self.diffusion, self.condition_dropout, self.schedule, self.sampler, self.betas = (
            diffusion,
            condition_dropout,
            schedule,
            sampler,
            betas,
        )
        self.table, self.start = ParameterTable(parameters), start
        self.strict_loading = False  # checkpoints hold what is trained, and are compared with it by name

    def configure_model(self) -> None:
        """Build the parts and bring them under the parameter table; Lightning calls this where the weights are to live."""
        if hasattr(self, "unet"):
            return
        if self.encoder.device is not None and self._trainer and self._trainer.world_size > 1:
            raise ValueError(
                f"encoder.device: {self.encoder.device} is for one process (trainer.devices: 1), not for {self._trainer.world_size}"
            )
        self.build()
        if self.start and self._trainer and not self._trainer.ckpt_path:
            self.load_trained(AtomicCheckpointIO().load_checkpoint(self.start))

    def build(self, weights: bool = True) -> None:
        """Create encoder, UNet, adapter and codec; ``weights=False`` builds from configurations alone (on the meta device, say)."""
        adapter, unet, codec, reference_attention = self.parts
        self.encoder.build(weights)
        self.unet = unet.build(weights)
        self.adapter = adapter.build(self.encoder.hidden_size, int(self.unet.config.cross_attention_dim), pooled_features(self.unet))
        self.codec = codec.build(weights)
        self.reference_attention = None
        if reference_attention is not None:
            self.reference_attention = reference_attention.build(self.unet)
            give_partial_pass(self.unet)
        self.table.apply(self, [part for part in PARTS if getattr(self, part) is not None])

    # -- one step ------------------------------------------------------------------------------------------------------------

    def condition(self, batch: Batch) -> Condition:
        """Prompts to what the UNet attends to."""
        return self.conditioner(batch.instructions, batch.markers, batch.references, batch.phrases)

    @property
    def references_in_prompt(self) -> bool:
        """Whether the encoder sees the references, and does not leave them to the UNet alone."""
        *_, config = self.parts
        return config is None or config.in_prompt

    @property
    def conditioner(self) -> Conditioner:
        """The parts between a prompt and the UNet."""
        return Conditioner(self.encoder, self.adapter, self.unet, self.codec, self.reference_attention)

    def forward(self, z_t: Tensor, timesteps: Tensor, condition: Condition, side: tuple[int, int]) -> Tensor:
        """The UNet's prediction, [b, c, h, w]."""
        return denoise(self.unet, z_t, timesteps, condition, side, self.reference_attention)

    def denoising_step(self, batch: Batch) -> DenoisingStep:
        """Noise the target, drop conditions, predict. All randomness comes from the samples' own seeds."""
        height, width = batch.target.shape[-2:]
        draw = SampleNoise(batch.seed, (self.codec.channels, height // self.codec.factor, width // self.codec.factor), self.diffusion)
        return self.predict(drop_condition(batch, self.condition_dropout, draw.dropout), draw)

    def predict(self, batch: Batch, draw: SampleNoise) -> DenoisingStep:
        """Encode the target, noise it, encode the prompts, and let the UNet predict."""
        z0 = self.codec.encode(batch.target, draw.posterior.to(batch.target.device))
        source = None if batch.edit is None else self.codec.encode(batch.edit.source)
        for term in self.terms():
            z0 = term.clean(batch, z0, source)
        noise, timesteps = draw.noise.to(z0.device), draw.timesteps.to(z0.device)
        z_t = self.diffusion.add_noise(z0, noise, timesteps)
        condition = self.condition(batch)
        if source is not None and batch.edit is not None:
            condition = condition._replace(source=batch.edit.seen(source))
        height, width = batch.target.shape[-2:]
        prediction = self(z_t, timesteps, condition, (height, width))
        return DenoisingStep(
            batch, condition, z0, z_t, timesteps, noise, prediction, self.diffusion.estimate_z0(prediction, z_t, timesteps), source
        )

    def terms(self) -> list[LossTerm]:
        """The trainer's callbacks that add to the loss."""
        return [c for c in self._trainer.callbacks if isinstance(c, LossTerm)] if self._trainer else []  # type: ignore[attr-defined]

    def loss(self, step: DenoisingStep) -> dict[str, Tensor]:
        """The named terms of the loss, weighted; a subclass adds or replaces its own here."""
        target = self.diffusion.target(step.z0, step.noise, step.timesteps)
        terms = {"diffusion": diffusion_loss(step.prediction, target, self.diffusion.weight(step.timesteps))}
        for callback in self.terms():
            terms |= {name: callback.weight * term for name, term in callback.compute(step).items()}
        return terms

    def training_step(self, batch: Batch | None, batch_idx: int) -> Tensor | None:
        if batch is None:  # every row of it was bad; counted and listed by the data module
            return None
        terms = self.loss(self.denoising_step(batch))
        total = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(total):  # before it reaches the weights
            values = ", ".join(f"{name} {term.item():g}" for name, term in terms.items())
            raise ValueError(f"loss is {total.item():g} at step {self.global_step} (terms: {values}; rows: {', '.join(batch.ids)})")
        self.log_dict({f"loss/{name}": term.detach() for name, term in terms.items()}, batch_size=batch.size)
        self.log("loss", total.detach(), prog_bar=True, batch_size=batch.size)
        return total

    def on_train_batch_end(self, *_: Any) -> None:
        if isinstance(data := getattr(self.trainer, "datamodule", None), MultimodalDataModule):
            self.log("data/bad_rows", float(len(data.bad)))

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        total = torch.stack(list(self.loss(self.denoising_step(batch)).values())).sum()
        self.log("loss/validation", total, batch_size=batch.size, sync_dist=True)
        return total

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Pictures [b, 3, H, W] in [-1, 1]; each sample's noise comes from its own seed."""
        pipeline = MultimodalPipeline.of(self)
        pipeline.set_progress_bar_config(disable=True)
        source = None
        if batch.edit is not None and takes_source(self.unet):
            source = batch.edit.seen(self.codec.encode(batch.edit.source))
        condition = pipeline.encode(batch.instructions, batch.markers, batch.references, batch.phrases, source)
        shown = None
        if self.sampler.image_guidance_scale is not None:
            shown = pipeline.encode(*without_words(batch.markers), batch.references, None, source)
        noise = [torch.Generator().manual_seed(seed) for seed in batch.seed.tolist()]
        height, width = batch.target.shape[-2:]
        return pipeline.draw(condition, height=height, width=width, generator=noise, shown=shown)

    # -- optimizer and checkpoints -------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """One group a trained row, and the schedule in optimizer steps."""
        fused = "mixed" not in str(self.trainer.precision)  # Lightning does not clip the gradients of a fused optimizer under autocast
        optimizer = make_optimizer(self.table.groups(), self.betas, fused)
        steps = self.trainer.max_steps
        if self.schedule.decay != "constant" and steps < 1:
            raise ValueError(f"schedule.decay: {self.schedule.decay} needs trainer.max_steps")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: self.schedule.factor(i, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            beside_parameters(optimizer)

    def trainable(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = self.trainable()
        checkpoint["state_dict"] = {n: v for n, v in checkpoint["state_dict"].items() if n in names}

    def load_trained(self, checkpoint: dict[str, Any]) -> None:
        """Take over what the checkpoint's run has trained, averaged where it kept an average; the rest of its state stays behind.

        Raises:
            ValueError: the checkpoint is of another parameter table.
        """
        self.on_load_checkpoint(checkpoint)
        weights = {n: w.to(self.get_parameter(n).dtype) for n, w in trained_weights(checkpoint).items()}
        self.load_state_dict(weights, strict=False)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        saved, here = set(checkpoint["state_dict"]), set(self.trainable())
        if saved != here:
            name = sorted(saved ^ here)[0]
            where = "the checkpoint" if name in saved else "this parameter table"
            raise ValueError(
                f"the checkpoint is of another parameter table: {len(saved ^ here)} tensors differ, first {name}, trained only in {where}"
            )


class SampleNoise:
    """All random numbers of a batch, each sample's from a generator of its own: they depend neither on the batch around it nor
    on the number of devices.

    Args:
        seeds: [b] int64.
        shape: of the latents, (c, h, w).
    """

    def __init__(self, seeds: Tensor, shape: tuple[int, int, int], diffusion: Diffusion) -> None:
        rows = []
        for seed in seeds.tolist():
            g = torch.Generator().manual_seed(seed)
            t = diffusion.sample_timestep(g)
            noise = torch.randn(shape, generator=g)
            if diffusion.offset_noise:
                noise = noise + diffusion.offset_noise * torch.randn(shape[0], 1, 1, generator=g)
            rows.append((t, noise, torch.randn(shape, generator=g), torch.rand((), generator=g)))
        self.timesteps, self.noise, self.posterior, self.dropout = (torch.stack(column) for column in zip(*rows, strict=True))

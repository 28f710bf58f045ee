"""The LightningModule: encoder, adapter and UNet, wired, and the step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .batch import Batch, Condition, Moments
from .conditioning import Conditioner
from .diffusion import ConditionDropout, Diffusion, drop_condition
from .losses import DenoisingStep, diffusion_loss
from .models.adapter import AdapterConfig
from .models.codec import CodecConfig
from .models.encoder import Encoder
from .models.loading import Weights
from .models.parameters import Row
from .models.references import ReferenceAttentionConfig, give_partial_pass
from .models.source_gate import SourceGate
from .models.unet import UNetConfig, denoise, pooled_features, takes_source
from .pipeline import MultimodalPipeline, Sampler, without_words
from .tuning import LRSchedule, TunedModule

PARTS = ("encoder", "adapter", "unet", "reference_attention", "source_gate")


class MultimodalDiffusion(TunedModule):
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
        source_gate: a layer that says where an edit's source stays, so that the UNet need not learn to copy it; it takes the source's
            latents, as ``unet.source_latents`` lets it.
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
        source_gate: bool = False,
        start: str | None = None,
    ) -> None:
        super().__init__(parameters, schedule, betas, start)
        self.encoder = encoder
        self.parts, self.gated = (adapter, unet, codec, reference_attention), source_gate
        self.diffusion, self.condition_dropout, self.sampler = diffusion, condition_dropout, sampler

    def check(self) -> None:
        _, unet, *_ = self.parts
        if self.gated and not unet.source_latents:
            raise ValueError("source_gate: true needs unet.source_latents: true, as the UNet must see what it keeps")
        if self.encoder.device is not None and self._trainer and self._trainer.world_size > 1:
            raise ValueError(
                f"encoder.device: {self.encoder.device} is for one process (trainer.devices: 1), not for {self._trainer.world_size}"
            )

        if self.encoder.quantization is not None and self.engine is not None:
            raise ValueError(
                f"encoder.quantization: {self.encoder.quantization} is for one process or DDP, not for {type(self.engine).__name__}"
            )

    def build(self, weights: Weights = True) -> None:
        """Create encoder, UNet, adapter and codec."""
        adapter, unet, codec, reference_attention = self.parts
        self.encoder.build(weights)
        self.unet = unet.build(weights)
        self.adapter = adapter.build(self.encoder.hidden_size, int(self.unet.config.cross_attention_dim), pooled_features(self.unet))
        self.codec = codec.build(weights)
        self.encoder.in_step = self.engine is not None and self.trainer.world_size > 1
        self.reference_attention = None
        if reference_attention is not None:
            self.reference_attention = reference_attention.build(self.unet)
            give_partial_pass(self.unet)
        self.source_gate = SourceGate.of(self.unet, self.diffusion) if self.gated else None
        self.apply_table([part for part in PARTS if getattr(self, part) is not None])

    def roots(self) -> list[nn.Module]:
        """The VAE stays whole, and the layers of reference attention are called one by one."""
        layers = [] if self.reference_attention is None else list(self.reference_attention.layers.values())
        return [part for part in super().roots() if part not in (self.codec, self.reference_attention)] + layers

    # -- one step ------------------------------------------------------------------------------------------------------------

    def condition(self, batch: Batch) -> Condition:
        """Prompts to what the UNet attends to."""
        condition = self.conditioner(batch.instructions, batch.markers, batch.references, batch.phrases)
        return condition._replace(sizes=batch.sizes)

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
        return denoise(self.unet, z_t, timesteps, condition, side, self.reference_attention, self.source_gate)

    def denoising_step(self, batch: Batch) -> DenoisingStep:
        """Noise the target, drop conditions, predict. All randomness comes from the samples' own seeds."""
        height, width = batch.target.shape[-2:]
        draw = SampleNoise(batch.seed, (self.codec.channels, height // self.codec.factor, width // self.codec.factor), self.diffusion)
        return self.predict(drop_condition(batch, self.condition_dropout, draw.dropout), draw)

    def predict(self, batch: Batch, draw: SampleNoise) -> DenoisingStep:
        """Encode the target, noise it, encode the prompts, and let the UNet predict."""
        moments = self.moments(batch)
        z0 = self.codec.encode(batch.target, draw.posterior.to(batch.target.device), moments.target)
        source = None if batch.edit is None else self.codec.encode(batch.edit.source, moments=moments.source)
        for term in self.terms():
            z0 = term.clean(batch, z0, source)
        noise, timesteps = draw.noise.to(z0.device), draw.timesteps.to(z0.device)
        z_t = self.diffusion.add_noise(z0, noise, timesteps)
        height, width = batch.target.shape[-2:]
        with self.watched():
            condition = self.condition(batch)
            if source is not None and batch.edit is not None:
                condition = condition._replace(source=batch.edit.seen(source))
            prediction = self(z_t, timesteps, condition, (height, width))
        return DenoisingStep(
            batch, condition, z0, z_t, timesteps, noise, prediction, self.diffusion.estimate_z0(prediction, z_t, timesteps), source
        )

    def moments(self, batch: Batch) -> Moments:
        """Of targets and sources, by one pass of the VAE: a second one for sources would leave out a process without edits, and those that
        gather the VAE's weights from each other would wait for it."""
        known = batch.moments or Moments()
        pictures = {"target": batch.target} | ({} if batch.edit is None else {"source": batch.edit.source})
        unknown = [name for name in pictures if getattr(known, name) is None]
        if not unknown:
            return known
        found = self.codec.moments(torch.cat([pictures[name] for name in unknown])).chunk(len(unknown))
        return known._replace(**dict(zip(unknown, found, strict=True)))

    def loss(self, step: DenoisingStep) -> dict[str, Tensor]:
        """The named terms of the loss, weighted; a subclass adds or replaces its own here."""
        target = self.diffusion.target(step.z0, step.noise, step.timesteps)
        return {"diffusion": diffusion_loss(step.prediction, target, self.diffusion.weight(step.timesteps))} | self.added(step)

    def training_step(self, batch: Batch | None, batch_idx: int) -> Tensor | None:
        if batch is None:  # every row of it was bad; counted and listed by the data module
            return None
        return self.total(self.loss(self.denoising_step(batch)), batch.size, batch.ids)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        total = torch.stack(list(self.loss(self.denoising_step(batch)).values())).sum()
        self.log("loss/validation", total, batch_size=batch.size, sync_dist=True)
        return total

    def test_step(self, batch: Batch | None, batch_idx: int) -> Tensor | None:
        return None if batch is None else self.validation_step(batch, batch_idx)  # a suite is for callbacks alone

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Pictures [b, 3, H, W] in [-1, 1]; each sample's noise comes from its own seed."""
        pipeline = MultimodalPipeline.of(self)
        pipeline.set_progress_bar_config(disable=True)
        edits = batch.edits
        source = edits.seen(self.codec.encode(edits.source)) if takes_source(self.unet) else None
        condition = pipeline.encode(batch.instructions, batch.markers, batch.references, batch.phrases, source)
        shown = None
        if self.sampler.image_guidance_scale is not None:
            shown = pipeline.encode(*without_words(batch.markers), batch.references, None, source)
        noise = [torch.Generator().manual_seed(seed) for seed in batch.seed.tolist()]
        height, width = batch.target.shape[-2:]
        return pipeline.draw(condition, height=height, width=width, generator=noise, shown=shown, sources=edits.source)


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

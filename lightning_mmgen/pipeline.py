"""Inference: a ``diffusers`` pipeline that draws pictures from multimodal prompts."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import BaseOutput
from PIL import Image as PILImage
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import interpolate

from .batch import Condition, Context, PackedImages, Span, pack
from .conditioning import Conditioner
from .data.images import pixels
from .diffusion import GuidanceRule, guide, guided_at
from .models.adapter import Adapter
from .models.codec import Codec
from .models.encoder import Encoder
from .models.references import ReferenceAttention, give_partial_pass
from .models.source_gate import SourceGate
from .models.unet import denoise, takes_source
from .prompt import MultimodalPrompt

if TYPE_CHECKING:
    from .module import MultimodalDiffusion


SchedulerName = Literal["ddim", "ddpm"]
SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


@dataclass
class Sampler:
    """How pictures are drawn from the model (MUMU, section 3: DDIM, 50 steps, guidance 6).

    Instruct-Imagen's own is ``{scheduler: ddpm, steps: 256, guidance: alternating, guidance_scale: 25}`` (appendix). The paper's text names
    neither a thresholding nor a clipping at scale 25, nor which of DDPM's variances it takes: here the estimate of z_0 is left as it is,
    and the variance is the posterior's (Ho et al. 2020, equation 7).

    Args:
        steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 is none.
        scheduler: ``ddim`` (eta 0), or ``ddpm``, which draws noise in each step.
        guidance: ``constant``, or ``alternating``: the scale on even steps, none on odd ones, which halves their work.
        image_guidance_scale: of the pictures alone, beside the text's; None is one scale for the whole prompt, and a pass less.
        source_detail: how far, in squared latents, an edit may be from its source and still show the source's own pixels, not the VAE's of
            them (:meth:`~lightning_mmgen.models.codec.Codec.decode_edit`); None is the VAE's alone.
    """

    steps: int = 50
    guidance_scale: float = 6.0
    scheduler: SchedulerName = "ddim"
    guidance: GuidanceRule = "constant"
    image_guidance_scale: float | None = None
    source_detail: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("scheduler", get_args(SchedulerName)), ("guidance", get_args(GuidanceRule))):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"sampler.{name} must be {' or '.join(known)}, not {value!r}")
        if self.source_detail is not None and self.source_detail <= 0:
            raise ValueError(f"sampler.source_detail must be positive, not {self.source_detail}")

    def scheduler_of(self, config: Any) -> DDIMScheduler | DDPMScheduler:
        """The scheduler, for a process given as a ``diffusers`` configuration."""
        return SCHEDULERS[self.scheduler].from_config(config)


class PipelineOutput(BaseOutput):
    """``images``: a list of PIL pictures, or a tensor [b, 3, H, W] in [-1, 1]."""

    images: list[Image] | Tensor


class MultimodalPipeline(DiffusionPipeline):
    """Text with pictures in it to pictures (MUMU, section 3: DDIM, no negative prompt).

    The empty condition of the guidance is an empty prompt through encoder and adapter. ``sampler`` holds steps and guidance scale for calls
    that name none, and the guidance rule; setting it sets the scheduler too. A pipeline that was exported brings its own. Any scheduler of
    ``diffusers`` may be set after it. With ``reference_attention`` the UNet reads references too, or alone.
    """

    _optional_components = ["reference_attention", "source_gate"]
    scheduler: Any

    def __init__(
        self,
        encoder: Encoder,
        adapter: Adapter,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: Any,
        sampler: Sampler | None = None,
        reference_attention: ReferenceAttention | None = None,
        source_gate: SourceGate | None = None,
    ) -> None:
        super().__init__()
        layers = {"reference_attention": reference_attention, "source_gate": source_gate}
        self.register_modules(encoder=encoder, adapter=adapter, unet=unet, vae=vae, scheduler=scheduler, **layers)
        if reference_attention is not None:
            give_partial_pass(unet)
        self.codec, self._sampler = Codec(vae), sampler or Sampler()
        if sampler is not None:
            self.sampler = sampler

    @property
    def sampler(self) -> Sampler:
        return self._sampler

    @sampler.setter
    def sampler(self, sampler: Sampler) -> None:
        self._sampler, self.scheduler = sampler, sampler.scheduler_of(self.scheduler.config)

    @classmethod
    def of(cls, module: MultimodalDiffusion) -> MultimodalPipeline:
        """The pipeline over a module's own parts: what the callbacks sample with during training."""
        scheduler = module.sampler.scheduler_of(module.diffusion.scheduler_config())
        layers = (module.reference_attention, module.source_gate)
        return cls(module.encoder, module.adapter, module.unet, module.codec.vae, scheduler, module.sampler, *layers)

    @classmethod
    def from_pretrained(cls, folder: str | Path, encoder_device: str | None = None) -> MultimodalPipeline:  # type: ignore[override]
        """Load what ``mmgen export`` wrote, LoRA unmerged.

        Args:
            encoder_device: a device of the encoder's own, where it stays when the pipeline moves.

        Raises:
            FileNotFoundError: no ``model_index.json`` in the folder.
        """
        from .tools.export import load_lora

        root = Path(folder)
        if not (root / "model_index.json").is_file():
            raise FileNotFoundError(f"{folder}: holds no model_index.json")
        index = json.loads((root / "model_index.json").read_text())
        parts = {}
        for name in ("encoder", "unet", "codec"):
            spec = index[name]
            kind = getattr(importlib.import_module("lightning_mmgen.models." + spec["module"]), spec["class"])
            parts[name] = kind(**spec["init"])
        encoder = parts["encoder"]
        encoder.device = encoder_device
        encoder.build()
        unet = UNet2DConditionModel.from_pretrained(root / "unet") if (root / "unet").is_dir() else parts["unet"].build()
        load_lora(encoder, unet, root)
        kinds = {"reference_attention": ReferenceAttention, "source_gate": SourceGate}
        layers = {name: kind.from_pretrained(root / name) for name, kind in kinds.items() if (root / name).is_dir()}
        sampler = Sampler(**index["sampler"])
        adapter, scheduler = Adapter.from_pretrained(root / "adapter"), SCHEDULERS[sampler.scheduler].from_pretrained(root / "scheduler")
        return cls(encoder, adapter, unet, parts["codec"].build().vae, scheduler, sampler, **layers).frozen()

    def frozen(self) -> MultimodalPipeline:
        """For inference alone: evaluation mode, no gradients, and every weight in memory of its own. PyTorch picks kernels by gradients
        and alignment, so that without this a checkpoint and its export would differ in the last bits."""
        for part in filter(None, (self.encoder, self.adapter, self.unet, self.vae, self.reference_attention, self.source_gate)):
            for parameter in part.eval().requires_grad_(False).parameters():
                parameter.data = parameter.data.clone()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[MultimodalPrompt] | MultimodalPrompt,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> PipelineOutput:
        """Draw one picture a prompt.

        Args:
            prompts: instructions with their references.
            num_inference_steps: denoising steps; the sampler's own if none are given.
            guidance_scale: classifier-free guidance, likewise; 1 is none, and halves the work.
            height, width: of the pictures, in pixels; the UNet's own size if none is given.
            generator: of the initial noise and then of each step's, one or one a prompt; on the CPU.
            output_type: ``pil`` or ``pt``.

        Raises:
            ValueError: a size that the codec cannot make.
        """
        prompts = [prompts] if isinstance(prompts, MultimodalPrompt) else list(prompts)
        side = self.encoder.reference_size
        references = pack([[pixels(r.image, side) for r in p.references] for p in prompts])
        markers = [[r.marker for r in p.references] for p in prompts]
        phrases = [[r.phrase for r in p.references] for p in prompts]
        height, width = self._size(height, width)
        sources, source = self.sources(prompts, height, width)
        condition = self.encode([p.instruction for p in prompts], markers, references, phrases, source)
        shown = None if self.sampler.image_guidance_scale is None else self.encode(*without_words(markers), references, None, source)
        pictures = self.draw(condition, num_inference_steps, guidance_scale, height, width, generator, shown, sources)
        return PipelineOutput(images=pictures if output_type == "pt" else to_pil(pictures))

    @torch.no_grad()
    def encode(
        self,
        instructions: list[str],
        markers: list[list[int]],
        references: list[PackedImages],
        phrases: list[list[str]] | None = None,
        source: Tensor | None = None,
    ) -> Condition:
        """What the UNet attends to, for b prompts; ``source``: latents [b, c, h, w] that it takes beside z_t."""
        references = [group.map(lambda t: t.to(self.device)) for group in references]
        condition = Conditioner(self.encoder, self.adapter, self.unet, self.codec, self.reference_attention)
        return condition(instructions, markers, references, phrases)._replace(source=source)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        height, width = height or self.side, width or self.side
        if height % self.multiple or width % self.multiple:
            raise ValueError(f"height and width must be multiples of {self.multiple}, not {height} and {width}")
        return height, width

    @property
    def side(self) -> int:
        """The UNet's own height and width, in pixels."""
        return int(self.unet.config.sample_size) * self.codec.factor

    @property
    def multiple(self) -> int:
        """What heights and widths must be multiples of, in pixels."""
        return int(self.codec.factor * 2 ** (len(self.unet.config.block_out_channels) - 1))

    def sources(self, prompts: Sequence[MultimodalPrompt], height: int, width: int) -> tuple[Tensor | None, Tensor | None]:
        """The prompts' sources, pictures [b, 3, H, W] in [-1, 1] and latents [b, c, h, w], for a UNet that takes them; else None. Zeros
        where there is no source."""
        if not takes_source(self.unet):
            return None, None
        pictures = torch.zeros(len(prompts), 3, height, width, device=self.device)
        latents = torch.zeros(len(prompts), self.codec.channels, *(n // self.codec.factor for n in (height, width)), device=self.device)
        for i, prompt in enumerate(prompts):
            picture = next((r.image for r in prompt.references if r.role == "source"), None)
            if picture is not None:
                whole = pixels(picture)[None].to(self.device)
                if whole.shape[-2:] != (height, width):
                    whole = interpolate(whole, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)
                pictures[i], latents[i] = whole[0], self.codec.encode(whole)[0]
        return pictures, latents

    @torch.no_grad()
    def draw(
        self,
        condition: Condition,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        shown: Condition | None = None,
        sources: Tensor | None = None,
    ) -> Tensor:
        """Pictures [b, 3, H, W] in [-1, 1] for an encoded condition; arguments as in :meth:`__call__`.

        Args:
            shown: the condition of the pictures alone, for the sampler's ``image_guidance_scale``.
            sources: pictures [b, 3, H, W] of the condition's source latents, for the sampler's ``source_detail``.
        """
        steps = self.sampler.steps if num_inference_steps is None else num_inference_steps
        scale = self.sampler.guidance_scale if guidance_scale is None else guidance_scale
        height, width = self._size(height, width)
        image_scale = self.sampler.image_guidance_scale
        unguided = scale == 1 and (shown is None or image_scale == 1)
        every = [condition] if unguided else [self.encode([""], [[]], []), *([] if shown is None else [shown]), condition]
        joined = condition if unguided else join(*every)
        shape = (len(condition.tokens), self.codec.channels, height // self.codec.factor, width // self.codec.factor)
        self.scheduler.set_timesteps(steps, device=self.device)
        latents = initial_noise(shape, generator).to(self.device) * self.scheduler.init_noise_sigma
        noise = self._step_noise(generator)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            alone = unguided or not guided_at(i, self.sampler.guidance)
            given = condition if alone else joined
            z_t = self.scheduler.scale_model_input(torch.cat([latents] * (1 if alone else len(every))), t)
            layers = (self.reference_attention, self.source_gate)
            prediction = denoise(self.unet, z_t, t.expand(len(z_t)), given, (height, width), *layers).float()
            if not alone:
                prediction = guide(*prediction.chunk(len(every)), scale=scale, image_scale=image_scale)
            latents = self.scheduler.step(prediction, t, latents, **noise).prev_sample
        if sources is None or condition.source is None or self.sampler.source_detail is None:
            return self.codec.decode(latents)
        return self.codec.decode_edit(latents, sources, condition.source, self.sampler.source_detail)

    def _step_noise(self, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
        """Where a step's noise comes from, for a scheduler that draws any: as :func:`initial_noise`, on the CPU."""
        if "generator" not in inspect.signature(self.scheduler.step).parameters:
            return {}
        return {"generator": torch.default_generator if generator is None else generator}


def initial_noise(shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Noise on the CPU, so that a seed gives one picture on any device."""
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} prompts")
        return torch.stack([torch.randn(shape[1:], generator=g) for g in generator])
    return torch.randn(shape, generator=generator)


def without_words(markers: list[list[int]]) -> tuple[list[str], list[list[int]]]:
    """Prompts of the pictures alone, as condition dropout leaves them when it drops the text."""
    return ["".join(f"[ref#{k}]" for k in marks) for marks in markers], markers


def join(*conditions: Condition) -> Condition:
    """Conditions one after the other, padded to the longest: k of them, [k * b, n, d]. One of a single prompt stands for all b."""
    full = conditions[-1]
    b, n = len(full.tokens), max(c.tokens.shape[1] for c in conditions)
    tokens, mask = full.tokens.new_zeros(len(conditions) * b, n, full.tokens.shape[2]), full.mask.new_zeros(len(conditions) * b, n)
    for i, c in enumerate(conditions):
        rows = slice(i * b, (i + 1) * b)
        tokens[rows, : c.tokens.shape[1]], mask[rows, : c.mask.shape[1]] = c.tokens, c.mask
    pooled = None if full.pooled is None else torch.cat([c.pooled.expand(b, -1) for c in conditions if c.pooled is not None])
    source = None
    if full.source is not None:
        source = torch.cat([torch.zeros_like(full.source) if c.source is None else c.source for c in conditions])
    spans: list[list[Span]] = [s for c in conditions for s in (c.spans if len(c.spans) == b else [[]] * b)]
    return Condition(tokens, mask, spans, pooled, context=_join_contexts([c.context for c in conditions]), source=source)


def _join_contexts(contexts: list[Context | None]) -> Context | None:
    """The empty condition has no context, and gets one without a token."""
    full = contexts[-1]
    if full is None:
        return None
    given = [c if c is not None and c.tokens.shape == full.tokens.shape else Context(*map(torch.zeros_like, full)) for c in contexts]
    return Context(torch.cat([c.tokens for c in given]), torch.cat([c.mask for c in given]))


def to_pil(pictures: Tensor) -> list[Image]:
    """Pixels [b, 3, H, W] in [-1, 1] as pictures."""
    arrays = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [PILImage.fromarray(a) for a in arrays]

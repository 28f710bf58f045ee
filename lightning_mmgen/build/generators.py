"""Diffusion models that read captions, as the builders of attention targets ask them: Stable Diffusion, SDXL, and this package's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from ..batch import Condition
from ..conditioning import Conditioner
from ..data.attention import Word
from ..diffusion import Diffusion
from ..models.adapter import Adapter
from ..models.attention import choose, layers_of
from ..models.codec import Codec, CodecConfig
from ..models.idefics2 import Idefics2Encoder
from ..models.unet import UNetConfig, denoise
from ..models.weights import locate
from ..pipeline import MultimodalPipeline, Sampler
from ..words import WORD

STABLE_DIFFUSION: dict[str, Any] = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
}

TOYBOX_LAYERS = "up_blocks.0.attentions.1.*,up_blocks.1.*"
"""Where the embedded UNet looks at the objects that words name (``benchmarks/attention_targets.py``)."""


class Placed(NamedTuple):
    """A word of a caption, and which tokens of the condition spell it."""

    word: Word
    tokens: list[int]


def words_of(text: str) -> list[Word]:
    """The words of a text in lower case: letters and digits, with apostrophes and hyphens inside."""
    return [Word(match[0].lower(), match.start(), match.end()) for match in WORD.finditer(text)]


def placed(text: str, offsets: Iterable[Sequence[int]], first: int = 0) -> list[Placed]:
    """The words of a text, each with the tokens that share characters with it.

    Args:
        offsets: where each token begins and ends in the text, in characters.
        first: number of the first of them.
    """
    spans = [(k, start, end) for k, (start, end) in enumerate(offsets, first)]
    return [Placed(w, [k for k, start, end in spans if start < w.end and end > w.start]) for w in words_of(text)]


class Generator(ABC):
    """A diffusion model that reads captions.

    Args:
        unet, vae, scheduler: of its pipeline, in evaluation mode.
        guidance: its own guidance scale.
        rate: of null-text optimisation; suits the scale of its tokens.
        best: layers to take by default, as in :meth:`layers`; else those of resolution 32, or of the last up block with any.
    """

    def __init__(self, unet: Any, vae: Any, scheduler: Any, guidance: float, rate: float, best: str = "") -> None:
        self.unet, self.codec, self.scheduler = unet.eval().requires_grad_(False), Codec(vae), scheduler
        self.guidance, self.rate, self.best = guidance, rate, best

    @abstractmethod
    def read(self, captions: list[str]) -> Condition:
        """What the UNet attends to, for b captions."""

    @abstractmethod
    def empty(self) -> Condition:
        """The same for the empty prompt, b = 1."""

    @abstractmethod
    def words(self, caption: str) -> list[Placed]:
        """The words of a caption and their tokens in the condition; those of words that are cut off are none.

        Raises:
            RecordError: the caption is too long.
        """

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device  # type: ignore[no-any-return]

    @property
    def side(self) -> int:
        """The UNet's own height and width, in pixels."""
        return int(self.unet.config.sample_size) * self.codec.factor

    def predict(self, z: Tensor, timestep: int, condition: Condition) -> Tensor:
        """One pass of the UNet, in float32."""
        side = z.shape[-2] * self.codec.factor, z.shape[-1] * self.codec.factor
        return denoise(self.unet, z, torch.full((len(z),), timestep, device=z.device), condition, side).float()

    def layers(self, chosen: str, side: int) -> list[str]:
        """Names of cross-attention layers.

        Args:
            chosen: a resolution ("32"), or names and patterns with ``*``, parted by commas; "" for the default ones.
            side: of the latents.

        Raises:
            ValueError: there is no such layer.
        """
        names = list(layers_of(self.unet))
        at = {name: self._resolution(name, side) for name in names}
        last = [name for name in names if name.startswith("up_blocks")][-1]
        chosen = chosen or self.best or ("32" if 32 in at.values() else f"{last.split('.attentions')[0]}.*")
        if not chosen.isdecimal():
            return choose(names, [name.strip() for name in chosen.split(",")])
        if not (fitting := [name for name in names if at[name] == int(chosen)]):
            raise ValueError(f"--layers {chosen}: there are cross-attention layers of {', '.join(map(str, sorted(set(at.values()))))}")
        return fitting

    def _resolution(self, layer: str, side: int) -> int:
        """Side of a layer's maps, for latents of this side."""
        last, (part, number, *_) = len(self.unet.config.block_out_channels) - 1, layer.split(".")
        level = last if part == "mid_block" else int(number) if part == "down_blocks" else last - int(number)
        return -(-side // 2**level)


class StableDiffusion(Generator):
    """Stable Diffusion 1.x or SDXL.

    Args:
        pipe: of ``diffusers``.

    Raises:
        ValueError: its tokenizer does not tell where tokens lie.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe.unet, pipe.vae.float(), pipe.scheduler, guidance=7.5, rate=1e-2)
        self.pipe, self.xl = pipe, isinstance(pipe, StableDiffusionXLPipeline)
        if not pipe.tokenizer.is_fast:
            raise ValueError(f"{type(pipe.tokenizer).__name__} is not a fast tokenizer, which tells where tokens lie in the text")

    @torch.no_grad()
    def read(self, captions: list[str]) -> Condition:
        out = self.pipe.encode_prompt(captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return _condition(out[0], out[2] if self.xl else None)

    @torch.no_grad()
    def empty(self) -> Condition:
        """As the pipeline guides: SDXL's may be zeros."""
        out = self.pipe.encode_prompt("", device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=True)
        return _condition(out[1], out[3] if self.xl else None)

    def words(self, caption: str) -> list[Placed]:
        tokenizer = self.pipe.tokenizer
        out = tokenizer(caption, truncation=True, max_length=tokenizer.model_max_length, return_offsets_mapping=True)
        return placed(caption, out.offset_mapping)


def _condition(tokens: Tensor, pooled: Tensor | None) -> Condition:
    """Every token is attended to, padding too, as Stable Diffusion was trained."""
    return Condition(tokens.float(), torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device), [[] for _ in tokens], pooled)


class OwnGenerator(Generator):
    """A generator of this package: a VLM and an adapter read the captions.

    Args:
        pipe: its pipeline.
        best: see :class:`Generator`.
    """

    def __init__(self, pipe: MultimodalPipeline, best: str = "") -> None:
        super().__init__(pipe.unet, pipe.vae, pipe.scheduler, pipe.sampler.guidance_scale, rate=1e-1, best=best)
        self.encoder = pipe.encoder
        self.conditioner = Conditioner(pipe.encoder, pipe.adapter, pipe.unet, self.codec)

    @torch.no_grad()
    def read(self, captions: list[str]) -> Condition:
        return self.conditioner.read(captions, [[] for _ in captions], [])

    def empty(self) -> Condition:
        return self.read([""])

    def words(self, caption: str) -> list[Placed]:
        ids, _ = self.encoder.tokenise(caption, [], [])
        out = self.encoder.tokenizer(caption, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        return placed(caption, out.offset_mapping, first=len(ids) - len(out.input_ids))


def open_generator(model: str, dtype: str = "float32", device: str = "cpu") -> Generator:
    """A generator by the name or folder of a pipeline of ``diffusers``, an export of this package, or ``toybox``.

    Args:
        dtype: of Stable Diffusion's UNet and text encoders; this package's own are as they were written.

    Raises:
        FileNotFoundError: no such folder, or it holds no pipeline.
        ValueError: a pipeline of another kind.
    """
    if model == "toybox":
        return OwnGenerator(toybox_pipeline().to(device), TOYBOX_LAYERS)
    folder = locate(model)
    if Path(folder).is_dir() and not (Path(folder) / "model_index.json").is_file():
        raise FileNotFoundError(f"{model}: holds no model_index.json")
    kind = DiffusionPipeline.load_config(folder)["_class_name"]
    if kind == MultimodalPipeline.__name__:
        return OwnGenerator(MultimodalPipeline.from_pretrained(folder).to(device))
    if kind not in STABLE_DIFFUSION:
        raise ValueError(f"{model}: is a {kind}; attention targets come from Stable Diffusion 1.x, SDXL or an export of this package")
    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    settings = unused if kind == "StableDiffusionPipeline" else {}
    return StableDiffusion(STABLE_DIFFUSION[kind].from_pretrained(folder, torch_dtype=getattr(torch, dtype), **settings).to(device))


def toybox_pipeline() -> MultimodalPipeline:
    """The embedded generator, before any experiment."""
    encoder = Idefics2Encoder("toybox/vlm", image_tokens=25, norm=True, mix=0.3)
    encoder.build()
    unet, vae = UNetConfig("toybox/unet", None).build(), CodecConfig("toybox/vae", None).build().vae
    scheduler = DDIMScheduler(**Diffusion("v_prediction", zero_terminal_snr=True).scheduler_config())
    adapter = Adapter.from_pretrained(locate("toybox/adapter"))
    return MultimodalPipeline(encoder, adapter, unet, vae, scheduler, Sampler(steps=10, guidance_scale=2.0)).frozen()

"""What makes the toybox's pretrained parts: LightningModules for its VAE, its decoder, its CLIP and its DINO; ``pretrain_vlm.py`` has its
vision-language model's.

A real run starts from published weights and needs none of this. Each module writes a plain ``diffusers`` or ``transformers``
folder when its fit ends; the YAMLs are in ``experiments/toybox/``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from ..data.images import pixels
from ..diffusion import guide
from ..inversion import Way
from ..models.encoder import clip_normalised, imagenet_normalised
from ..models.unet import denoise
from ..models.weights import locate
from ..module import MultimodalDiffusion
from ..pipeline import MultimodalPipeline, join
from ..prompt import Record
from .tasks import TASKS
from .truth import picture
from .world import BACKGROUNDS, STYLES, random_scene


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine to zero at ``steps`` optimizer steps."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, 0.5 * (1 + np.cos(np.pi * min(i / steps, 1.0)))))


class Pictures(Dataset[Tensor]):
    """Scenes of the training split as pixels [3, 64, 64] in [-1, 1]; sample i is a pure function of (seed, i)."""

    def __init__(self, length: int, seed: int = 0) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return pixels(picture(random_scene(np.random.default_rng((self.seed, index)))))


class Pretraining(L.LightningModule):
    """Shared part: AdamW with warm-up and cosine over the trainer's steps, EMA weights saved to ``out`` at the end of the fit."""

    def __init__(self, out: str, lr: float, batch_size: int, warmup: int, seed: int, ema: float) -> None:
        super().__init__()
        self.out, self.lr, self.batch_size, self.warmup, self.seed = Path(out), lr, batch_size, warmup, seed
        self.decay = ema
        self.net: Any
        self.mean: dict[str, Tensor] = {}

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.01, betas=(0.9, 0.99))
        schedule = warmup_cosine(optimizer, self.trainer.max_steps, self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, *_: object) -> None:
        decay = min(self.decay, (1 + self.global_step) / (10 + self.global_step))
        with torch.no_grad():
            for name, p in self.net.named_parameters():
                self.mean[name] = torch.lerp(p, self.mean[name], decay) if name in self.mean else p.clone()

    def on_fit_end(self) -> None:
        self.net.load_state_dict(self.mean, strict=False)
        self.finish()
        self.net.half().save_pretrained(self.out)

    def finish(self) -> None:
        """What is left to do to the averaged weights before they are saved."""

    @property
    def samples(self) -> int:
        """Of the whole fit."""
        return self.batch_size * max(self.trainer.max_steps, 1)

    def pictures(self) -> Pictures:
        return Pictures(self.samples, self.seed)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.pictures(), self.batch_size)


class VAEPretraining(Pretraining):
    """An ``AutoencoderKL`` of 8x and 16 channels: absolute and squared error, a light KL term, and at the end whitened latents.
    ``start``: the folder of a VAE to go on from, instead of a new one."""

    def __init__(
        self,
        out: str,
        channels: tuple[int, ...] = (16, 32, 64, 64),
        latent_channels: int = 16,
        kl: float = 3e-5,
        lr: float = 2e-3,
        batch_size: int = 16,
        warmup: int = 100,
        seed: int = 0,
        ema: float = 0.998,
        start: str | None = None,
    ) -> None:
        super().__init__(out, lr, batch_size, warmup, seed, ema)
        from diffusers import AutoencoderKL

        self.kl = kl
        net = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=channels,
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=8,
            sample_size=64,
            force_upcast=True,
        )
        if start:
            net.load_state_dict(AutoencoderKL.from_pretrained(locate(start)).state_dict())
        self.net = net.to(memory_format=torch.channels_last)

    def training_step(self, pixels: Tensor, batch_idx: int) -> Tensor:
        posterior = self.net.encode(pixels).latent_dist
        out = self.net.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        mse = F.mse_loss(out, pixels)
        self.log_dict({"loss/mse": mse, "loss/kl": kl}, prog_bar=True)
        return mse + 0.2 * F.l1_loss(out, pixels) + self.kl * kl

    def finish(self) -> None:
        pictures = self.pictures()
        whiten(self.net, torch.stack([pictures[i] for i in range(min(1024, len(pictures)))]).to(self.device))


@torch.no_grad()
def whiten(vae: Any, pixels: Tensor, floor: float = 0.05) -> None:
    """Turn and scale the latents of a VAE in place, within its two 1 x 1 convolutions, so that on ``pixels`` [b, 3, H, W] the channels
    are uncorrelated with unit variance: one that varies little is lost in the noise for nearly all timesteps, whatever it shows.
    A direction of less than ``floor`` times the largest standard deviation is scaled as one of that size. Decoded pictures stay the
    same; the posterior's variance becomes its mean over ``pixels``."""
    posterior = [vae.encode(p).latent_dist for p in torch.split(pixels, 64)]
    z = torch.cat([p.mean for p in posterior]).movedim(1, -1).flatten(0, -2).double()
    variance = torch.cat([p.var for p in posterior]).mean((0, 2, 3)).double()
    mean, (spread, axes) = z.mean(0), torch.linalg.eigh(torch.cov(z.T, correction=0))
    deviation = spread.clamp(min=0).sqrt().clamp(min=floor * spread[-1].sqrt())
    forth, back = axes / deviation @ axes.T, axes * deviation @ axes.T
    into, out, c = vae.quant_conv, vae.post_quant_conv, len(mean)
    weight, bias = into.weight.double(), into.bias.double()
    weight[:c, :, 0, 0], bias[:c] = forth @ weight[:c, :, 0, 0], forth @ (bias[:c] - mean)
    weight[c:], bias[c:] = 0, (forth**2 @ variance).log()
    into.weight.copy_(weight), into.bias.copy_(bias)
    weight = out.weight.double()
    out.bias.add_(weight[:, :, 0, 0] @ mean)
    out.weight.copy_((weight[:, :, 0, 0] @ back)[:, :, None, None])
    vae.register_to_config(scaling_factor=1.0, shift_factor=None)


class Records(Dataset[Record]):
    """Records of some tasks, drawn with weights; sample i is a pure function of (seed, i)."""

    def __init__(self, length: int, seed: int, tasks: dict[str, float]) -> None:
        self.length, self.seed, self.tasks = length, seed, tasks

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        rng = np.random.default_rng((self.seed, index))
        share = np.array(list(self.tasks.values()))
        return TASKS[str(rng.choice(list(self.tasks), p=share / share.sum()))](rng, False)


class RecordPretraining(Pretraining):
    """Trains on records of some ``tasks``, whose tensors are made in the step."""

    tasks: dict[str, float]

    def transfer_batch_to_device(self, batch: list[Record], device: torch.device, dataloader_idx: int) -> list[Record]:
        return batch

    def train_dataloader(self) -> DataLoader[Any]:
        records = Records(self.samples, self.seed, self.tasks)
        return DataLoader(records, self.batch_size, collate_fn=list)


class DecoderPretraining(RecordPretraining):
    """A VAE's decoder learns from latents that a trained base drew: noised to a place on the sampler's way and taken back under the
    caption, a picture's latents carry the base's own errors, and are to decode to the picture all the same. The encoder, and with it every
    latent that the base knows, stays as it is.

    Args:
        base: whose VAE it is, with the sampler that it is to be drawn with; all of it frozen.
        first: the noisiest place on the sampler's way that latents are noised to; before it not the base's errors but its choices count.
        plain: pictures a step whose latents are left as the encoder makes them.
    """

    def __init__(
        self,
        out: str,
        base: MultimodalDiffusion,
        first: int = 4,
        plain: int = 8,
        lr: float = 5e-4,
        batch_size: int = 16,
        warmup: int = 30,
        seed: int = 0,
        ema: float = 0.99,
    ) -> None:
        super().__init__(out, lr, batch_size, warmup, seed, ema)
        self.base, self.first, self.plain, self.tasks = base, first, plain, {"caption": 1.0}

    def configure_model(self) -> None:
        self.base.configure_model()
        self.base.requires_grad_(False).eval()
        self.pipeline = MultimodalPipeline.of(self.base)
        self.net = self.base.codec.vae
        for part in (self.net.decoder, self.net.post_quant_conv):
            part.requires_grad_(True)

    def training_step(self, records: list[Record], batch_idx: int) -> Tensor:
        target = torch.stack([pixels(r.target) for r in records if r.target is not None])
        z_0 = self.base.codec.encode(target)
        shown = torch.cat([self.drawn([r.instruction for r in records], z_0), z_0[: self.plain]])
        wanted = torch.cat([target, target[: self.plain]])
        out = self.base.codec.reconstruct(shown)
        absolute = (out - wanted).abs().mean((1, 2, 3))
        self.log_dict({"loss/drawn": absolute[: len(z_0)].mean(), "loss/plain": absolute[len(z_0) :].mean()}, prog_bar=True)
        return F.mse_loss(out, wanted) + 0.5 * absolute.mean()

    @torch.no_grad()
    def drawn(self, captions: list[str], z_0: Tensor) -> Tensor:
        """Latents [b, c, h, w] noised to a place on the sampler's way, at random from ``first`` on, and taken back from there."""
        encode, sampler = self.pipeline.encode, self.pipeline.sampler
        way = Way.of(self.pipeline.scheduler, sampler.steps)
        condition = join(encode([""], [[]], []), encode(captions, [[] for _ in captions], []))
        place = int(torch.randint(self.first, sampler.steps, ()))
        z, side = way.mixed(z_0, torch.randn_like(z_0), place), z_0.shape[-1] * self.base.codec.factor
        for i in range(place, sampler.steps):
            timesteps = torch.full((2 * len(z),), way.timesteps[i], device=z.device)
            predictions = denoise(self.base.unet, torch.cat([z, z]), timesteps, condition, (side, side), None)
            z = way.step(guide(*predictions.chunk(2), scale=sampler.guidance_scale), z, i)
        return z


def build_tokenizer(vocab_size: int, special: tuple[str, ...], frame: bool = False, seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from the toybox's own texts; any text can be spelt.

    Args:
        special: special tokens, in the order of their ids.
        frame: put ``<s>`` before and ``</s>`` after every text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    records = Records(len(TASKS) * 1000, seed, dict.fromkeys(TASKS, 1.0))
    texts = (f"{r.prompt().instruction} {r.answer or ''}" for r in (records[i] for i in range(len(records))))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    if frame:
        ends = [(t, raw.token_to_id(t)) for t in ("<s>", "</s>")]
        raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=list(special[4:]), **names)


class TextPretraining(RecordPretraining):
    """Has a tokenizer, which is saved beside the weights."""

    tokenizer: PreTrainedTokenizerFast

    def token_ids(self) -> dict[str, int]:
        """The special tokens' ids, as a text configuration takes them."""
        return {f"{n}_token_id": getattr(self.tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}

    def on_fit_end(self) -> None:
        self.tokenizer.save_pretrained(self.out)
        super().on_fit_end()


class CLIPPretraining(TextPretraining):
    """A small CLIP on (picture, caption), with the contrastive loss of Radford et al. 2021."""

    def __init__(
        self,
        out: str,
        vision: dict[str, int],
        text: dict[str, int],
        width: int = 64,
        lr: float = 1e-3,
        batch_size: int = 64,
        warmup: int = 100,
        seed: int = 0,
        ema: float = 0.99,
    ) -> None:
        super().__init__(out, lr, batch_size, warmup, seed, ema)
        from transformers import CLIPConfig, CLIPModel

        self.tokenizer = build_tokenizer(
            text["vocab_size"], ("<pad>", "<unk>", "<s>", "</s>"), frame=True
        )  # </s> is 3: CLIP treats an end token 2 as legacy
        self.tasks = {"caption": 1.0}
        self.net = CLIPModel(CLIPConfig(text_config={**text, **self.token_ids()}, vision_config=vision, projection_dim=width))

    def training_step(self, records: list[Record], batch_idx: int) -> Tensor:
        side = self.net.config.vision_config.image_size
        pictures = torch.stack([pixels(r.target, side) for r in records if r.target is not None])
        text = self.tokenizer([r.caption or "" for r in records], padding=True, return_tensors="pt")
        pictures = clip_normalised(pictures)
        out = self.net(input_ids=text.input_ids, attention_mask=text.attention_mask, pixel_values=pictures, return_loss=True)
        right = (out.logits_per_image.argmax(1) == torch.arange(len(records))).float().mean()
        self.log_dict({"loss/contrastive": out.loss, "accuracy": right}, prog_bar=True)
        return out.loss


class Views(Pictures):
    """Two views of a scene of the training split, [2, 3, side, side] in [-1, 1]: each in a style and on a ground of its own, each a random
    crop. Sample i is a pure function of (seed, i).

    Args:
        crop: the least share of the scene's side that a view shows.
    """

    def __init__(self, length: int, seed: int, side: int, crop: float) -> None:
        super().__init__(length, seed)
        self.side, self.crop = side, crop

    def __getitem__(self, index: int) -> Tensor:
        rng = np.random.default_rng((self.seed, index))
        scene, views = random_scene(rng), []
        for _ in range(2):
            shown = picture(replace(scene, background=str(rng.choice(list(BACKGROUNDS))), style=str(rng.choice(STYLES))))
            width = round(shown.width * rng.uniform(self.crop, 1))
            top, left = rng.integers(0, shown.width - width + 1, 2)
            views.append(pixels(shown.crop((left, top, left + width, top + width)), self.side))
        return torch.stack(views)


class DINOPretraining(Pretraining):
    """A small ``Dinov2Model`` whose class token tells toys on any ground and in any style: by contrast of :class:`Views` (SimCLR, Chen et
    al. 2020, equation 1) and not by DINO's self-distillation, which takes longer to begin.

    Args:
        vision: of ``Dinov2Config``.
        width: of the head's output, which is not saved.
    """

    def __init__(
        self,
        out: str,
        vision: dict[str, int],
        width: int = 64,
        temperature: float = 0.1,
        crop: float = 0.8,
        lr: float = 1e-3,
        batch_size: int = 64,
        warmup: int = 100,
        seed: int = 0,
        ema: float = 0.99,
    ) -> None:
        super().__init__(out, lr, batch_size, warmup, seed, ema)
        from transformers import Dinov2Config, Dinov2Model

        self.temperature, self.crop = temperature, crop
        self.net = Dinov2Model(Dinov2Config(**vision))
        self.head = nn.Sequential(nn.Linear(vision["hidden_size"], 128), nn.GELU(), nn.Linear(128, width))

    def pictures(self) -> Views:
        return Views(self.samples, self.seed, self.net.config.image_size, self.crop)

    def training_step(self, views: Tensor, batch_idx: int) -> Tensor:
        pictures = imagenet_normalised(views.transpose(0, 1).flatten(0, 1))
        loss, accuracy = contrast(self.head(self.net(pixel_values=pictures).last_hidden_state[:, 0]), self.temperature)
        self.log_dict({"loss/contrastive": loss, "accuracy": accuracy}, prog_bar=True)
        return loss


def contrast(features: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """NT-Xent of SimCLR: to name a view's other view among all other views.

    Args:
        features: [2n, d], first views before second ones.

    Returns: the loss, and how often the other view is the nearest.
    """
    unit, n = F.normalize(features, dim=1), len(features) // 2
    logits = (unit @ unit.T / temperature).fill_diagonal_(-torch.inf)
    other = torch.arange(2 * n, device=features.device).roll(n)
    return F.cross_entropy(logits, other), (logits.argmax(1) == other).float().mean()

"""What makes the toybox's pretrained parts: LightningModules for its VAE, its CLIP and its vision-language model.

A real run starts from published weights and needs none of this. Each module writes a plain ``diffusers`` or ``transformers``
folder when its fit ends; the YAMLs are in ``experiments/toybox/``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from ..batch import pack
from ..data.images import pixels
from ..losses import language_loss
from ..models.chat import following
from ..models.encoder import Prompts, clip_normalised
from ..models.idefics2 import Idefics2Encoder
from ..models.weights import locate
from ..prompt import Record
from .render import draw, toy_rgb
from .tasks import TASKS
from .world import NAMES, STYLES, TRAITS, Toy, random_scene

PORTRAITS = ("naming", "measuring")  # tasks whose pictures show one toy alone
KINDS = [*NAMES.values(), STYLES]  # what a toy's picture shows, by name
FACTS = [*map(len, KINDS), len(TRAITS) + 3]  # numbers that tell it: scores of each name, then the toy's measures


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
        picture, _ = draw(random_scene(np.random.default_rng((self.seed, index))))
        return torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1


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

    def pictures(self) -> Pictures:
        return Pictures(self.batch_size * max(self.trainer.max_steps, 1), self.seed)

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


class RecordPretraining(Pretraining):
    """Trains on records, whose tensors are made in the step, and saves the tokenizer beside the weights."""

    tokenizer: PreTrainedTokenizerFast
    tasks: dict[str, float]

    def token_ids(self) -> dict[str, int]:
        """The special tokens' ids, as a text configuration takes them."""
        return {f"{n}_token_id": getattr(self.tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}

    def transfer_batch_to_device(self, batch: list[Record], device: torch.device, dataloader_idx: int) -> list[Record]:
        return batch

    def on_fit_end(self) -> None:
        self.tokenizer.save_pretrained(self.out)
        super().on_fit_end()

    def train_dataloader(self) -> DataLoader[Any]:
        records = Records(self.batch_size * max(self.trainer.max_steps, 1), self.seed, self.tasks)
        return DataLoader(records, self.batch_size, collate_fn=list)


class CLIPPretraining(RecordPretraining):
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


class VLMPretraining(RecordPretraining):
    """An Idefics2-shaped VLM without perceiver: the language loss on answers about pictures and on captions, and a loss that has every
    single token of a toy's picture say what the toy is (:meth:`telling`).

    Args:
        reference_sizes: sides in pixels, one drawn at random for a batch, of pictures that show one toy alone.
        noise: standard deviation of the noise through which a token must say it, its own being 1; 0 leaves that loss out.
        emphasis: factors of single traits' errors in that loss, by the trait's name; 1 where none is given.
        train_language: train the language model too, not the vision tower and the projector alone.
        language_every: steps from one with the language loss to the next; those between see nothing but toys alone, at a third of the time.
        start: the folder of a VLM to go on from with its tokenizer, instead of a new one.
    """

    def __init__(
        self,
        out: str,
        vision: dict[str, int],
        text: dict[str, int],
        tasks: dict[str, float],
        reference_sizes: tuple[int, ...] = (40,),
        lr: float = 1e-3,
        batch_size: int = 32,
        warmup: int = 100,
        seed: int = 0,
        ema: float = 0.998,
        noise: float = 1.5,
        emphasis: dict[str, float] | None = None,
        train_language: bool = True,
        language_every: int = 1,
        start: str | None = None,
    ) -> None:
        super().__init__(out, lr, batch_size, warmup, seed, ema)
        from transformers import Idefics2Config, Idefics2ForConditionalGeneration

        if language_every > 1 and not (noise and set(tasks) & set(PORTRAITS)):
            raise ValueError("VLMPretraining: between steps with the language loss there is nothing to learn without noise and toys alone")
        self.tasks, self.reference_sizes, self.language_every = tasks, reference_sizes, language_every
        special = ("<unk>", "<s>", "</s>", "<pad>", "<image>", "<fake_token_around_image>", "<end_of_utterance>")
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(locate(start)) if start else build_tokenizer(text["vocab_size"], special)
        width = text["hidden_size"]
        perceiver = {
            "hidden_size": width,
            "resampler_n_latents": 8,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        }
        config = Idefics2Config(
            vision_config=vision,
            text_config={
                **text,
                **self.token_ids(),
                "model_type": "mistral",
                "max_position_embeddings": 2048,
                "sliding_window": None,
                "tie_word_embeddings": False,
            },
            perceiver_config=perceiver,
            image_token_id=self.tokenizer.convert_tokens_to_ids("<image>"),
            tie_word_embeddings=False,
        )
        self.net = Idefics2ForConditionalGeneration(config)
        torch.nn.init.normal_(self.net.get_input_embeddings().weight, std=0.1)  # words start far apart
        if start:
            self.net.load_state_dict(Idefics2ForConditionalGeneration.from_pretrained(locate(start)).state_dict())
        self.encoder = Idefics2Encoder(out, image_tokens=(reference_sizes[0] // vision["patch_size"]) ** 2, norm=True)
        self.encoder.adopt(self.net.model, self.tokenizer)
        self.noise, self.facts = noise, torch.nn.Linear(width, sum(FACTS))
        factors = [(emphasis or {}).get(name, 1.0) for name in TRAITS]
        self.register_buffer("factors", torch.tensor([*factors, *[1.0] * (FACTS[-1] - len(factors))]), persistent=False)
        if not train_language:
            self.net.model.text_model.requires_grad_(False)
            self.net.lm_head.requires_grad_(False)

    def training_step(self, records: list[Record], batch_idx: int) -> Tensor | None:
        speaks = batch_idx % self.language_every == 0
        records = records if speaks else [r for r in records if r.task in PORTRAITS]
        if not records:
            return None
        texts, answers = [r.prompt().instruction for r in records], [r.answer for r in records]
        full = [t + (f" {answer}</s>" if answer else "</s>") for t, answer in zip(texts, answers, strict=True)]
        markers = [[ref.marker for ref in r.references] for r in records]
        side = self.reference_sizes[int(torch.randint(len(self.reference_sizes), ()))]
        references = pack([[pixels(ref.image, side if r.task in PORTRAITS else None) for ref in r.references] for r in records])
        prompts = self.encoder.embed(full, markers, references)
        losses = {}
        if speaks:
            begun = [text if answer else "" for text, answer in zip(texts, answers, strict=True)]
            told = following(self.encoder, prompts, begun, markers, references)
            losses["loss/language"] = self.language(prompts, told, [answer is not None for answer in answers])
        if self.noise and (shown := toys_shown(records, prompts)):
            losses["loss/telling"] = self.telling(*shown)
        self.log_dict(losses, prog_bar=True)
        return torch.stack(list(losses.values())).sum()

    def language(self, prompts: Prompts, told: Tensor, asked: list[bool]) -> Tensor:
        """The language loss over the tokens that are ``told`` [b, n]; logs how many are right, also of those who ``asked`` alone."""
        logits = self.net.lm_head(self.encoder.read(prompts))
        right, counted = logits[:, :-1].argmax(-1) == prompts.tokens[:, 1:], told[:, 1:]
        if any(asked):
            self.log("accuracy/answers", right[asked][counted[asked]].float().mean())
        self.log("accuracy/tokens", right[counted].float().mean(), prog_bar=True)
        return language_loss(logits, prompts.tokens, told)

    def telling(self, tokens: Tensor, toys: list[Toy], styles: list[str]) -> Tensor:
        """How badly one linear layer tells a toy and its picture's style from any one of the picture's tokens [toys, patches, d], with
        noise on it: the cross-entropy of three names and of the style, and the squared error of each measure (:func:`measures`)."""
        told = self.facts(tokens + self.noise * torch.randn_like(tokens)).split(FACTS, dim=-1)  # [toys, patches, choices]
        loss = tokens.new_zeros(())
        named = [[getattr(toy, name) for toy in toys] for name in NAMES] + [styles]
        for names, kinds, choices in zip(named, KINDS, told[:-1], strict=True):
            right = torch.tensor([kinds.index(name) for name in names], device=tokens.device)
            loss = loss + F.cross_entropy(choices.movedim(-1, 1), right[:, None].expand(choices.shape[:2]))
        wanted = torch.tensor([measures(t) for t in toys], device=tokens.device)[:, None].expand_as(told[-1])
        has = wanted.isfinite()
        errors = ((told[-1] - wanted.nan_to_num()).square() * has).sum((0, 1)) / has.sum((0, 1)).clamp(min=1)
        return loss + (self.factors * errors).sum()


def toys_shown(records: list[Record], prompts: Prompts) -> tuple[Tensor, list[Toy], list[str]] | None:
    """The tokens [toys, patches, d] of all pictures that show one toy alone, the toys, and the pictures' styles."""
    shown = [
        (prompts.inputs[b, span.start : span.end], placed.toy, record.extra["truth"].scene.style)
        for b, record in enumerate(records)
        if record.task in PORTRAITS
        for span, placed in zip(prompts.spans[b], record.extra["truth"].scene.toys, strict=True)
    ]
    if not shown:
        return None
    tokens, toys, styles = zip(*shown, strict=True)
    return torch.stack(tokens), list(toys), list(styles)


def measures(toy: Toy) -> list[float]:
    """A toy's traits over their ranges and its first tone's red, green and blue, each from -1 to 1; not a number for a trait that it
    does not show."""
    shown = toy.traits()
    traits = [2 * (shown.get(name, math.nan) - low) / (high - low) - 1 for name, (low, high) in TRAITS.items()]
    return [*traits, *(2 * float(c) - 1 for c in toy_rgb(toy))]

"""What makes the toybox's vision-language model: the language loss, and a loss that has every token of a toy say what it is."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..batch import pack
from ..data.images import pixels
from ..losses import language_loss
from ..models.chat import following
from ..models.encoder import Prompts
from ..models.idefics2 import Idefics2Encoder
from ..models.weights import locate
from ..prompt import Record
from .pretrain import TextPretraining, build_tokenizer
from .render import SIDE, toy_rgb
from .truth import boxes
from .world import NAMES, SIZES, STYLES, TRAITS, Placed, Toy

PORTRAITS = ("naming", "measuring")  # tasks whose pictures show one toy alone
SCENES = ("question", "control")  # and those whose pictures show a whole scene, or its layout
KINDS = {**NAMES, "style": STYLES, "size": tuple(SIZES)}  # what a picture shows of a toy, by name
FACTS = [*map(len, KINDS.values()), len(TRAITS) + 3]  # numbers that tell it: scores of each name, then the toy's measures
UNSEEN = -100  # in place of a name's number: what a picture does not show
ALONE = (*NAMES, "style")  # the names that a toy alone on its picture shows
LAYOUT = ("shape", "size")  # and those that a control picture shows, beside the trait of proportions
ASPECT = list(TRAITS).index("aspect")


class Shown(NamedTuple):
    """Tokens [n, d] of pictures, which toy each of them shows [n], and of every toy the numbers of its names [toys, kinds], ``UNSEEN``
    where its picture does not show one, and its measures [toys, 8], not a number there."""

    tokens: Tensor
    which: Tensor
    names: Tensor
    measures: Tensor


class VLMPretraining(TextPretraining):
    """An Idefics2-shaped VLM without perceiver: the language loss on answers about pictures and on captions, and a loss that has every
    single token of a toy, alone on its picture or in a whole scene, say what the toy is (:meth:`telling`).

    Args:
        reference_sizes: sides in pixels, one drawn at random for a batch, of pictures that show one toy alone.
        scene_sizes: the same of pictures that show a whole scene.
        noise: standard deviation of the noise through which a token must say it, its own being 1; 0 leaves that loss out.
        emphasis: factors of single traits' errors in that loss, by the trait's name; 1 where none is given.
        train_language: train the language model too, not the vision tower and the projector alone.
        language_every: steps from one with the language loss to the next; those between see pictures alone, at a third of the time.
        start: the folder of a VLM to go on from with its tokenizer, instead of a new one.
    """

    def __init__(
        self,
        out: str,
        vision: dict[str, int],
        text: dict[str, int],
        tasks: dict[str, float],
        reference_sizes: tuple[int, ...] = (40,),
        scene_sizes: tuple[int, ...] = (SIDE,),
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

        if language_every > 1 and not (noise and set(tasks) & {*PORTRAITS, *SCENES}):
            raise ValueError("VLMPretraining: between steps with the language loss there is nothing to learn without noise and pictures")
        self.tasks, self.language_every = tasks, language_every
        self.sizes = dict.fromkeys(PORTRAITS, tuple(reference_sizes)) | dict.fromkeys(SCENES, tuple(scene_sizes))
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
        records = records if speaks else [r for r in records if r.task in self.sizes]
        if not records:
            return None
        texts, answers = [r.prompt().instruction for r in records], [r.answer for r in records]
        full = [t + (f" {answer}</s>" if answer else "</s>") for t, answer in zip(texts, answers, strict=True)]
        markers = [[ref.marker for ref in r.references] for r in records]
        drawn = {sizes: sizes[int(torch.randint(len(sizes), ()))] for sizes in dict.fromkeys(self.sizes.values())}
        sides = [drawn.get(self.sizes.get(r.task, ())) for r in records]
        references = pack([[pixels(ref.image, side) for ref in r.references] for r, side in zip(records, sides, strict=True)])
        prompts = self.encoder.embed(full, markers, references)
        losses = {}
        if speaks:
            begun = [text if answer else "" for text, answer in zip(texts, answers, strict=True)]
            told = following(self.encoder, prompts, begun, markers, references)
            losses["loss/language"] = self.language(prompts, told, [answer is not None for answer in answers])
        for name, shown in (("telling", toys_alone(records, prompts)), ("telling_scenes", toys_in_scenes(records, prompts))):
            if self.noise and shown:
                losses[f"loss/{name}"] = self.telling(shown)
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

    def telling(self, shown: Shown) -> Tensor:
        """How badly one linear layer tells a toy and its picture's style from any single one of its tokens, with noise on it: the
        cross-entropy of each name that the picture shows, and the squared error of each measure (:func:`measures`)."""
        told = self.facts(shown.tokens + self.noise * torch.randn_like(shown.tokens)).split(FACTS, dim=-1)  # [n, choices]
        loss = shown.tokens.new_zeros(())
        for right, choices in zip(shown.names[shown.which].unbind(1), told[:-1], strict=True):
            errors = F.cross_entropy(choices, right, ignore_index=UNSEEN, reduction="sum")
            loss = loss + errors / (right != UNSEEN).sum().clamp(min=1)
        wanted = shown.measures[shown.which]
        has = wanted.isfinite()
        squares = ((told[-1] - wanted.nan_to_num()).square() * has).sum(0) / has.sum(0).clamp(min=1)
        return loss + (self.factors * squares).sum()


def toys_alone(records: list[Record], prompts: Prompts) -> Shown | None:
    """All tokens of the pictures that show one toy alone; None without any."""
    return _shown(
        [
            (prompts.inputs[b, span.start : span.end], names(placed, record.extra["truth"].scene.style, ALONE), measures(placed.toy))
            for b, record in enumerate(records)
            if record.task in PORTRAITS
            for span, placed in zip(prompts.spans[b], record.extra["truth"].scene.toys, strict=True)
        ]
    )


def toys_in_scenes(records: list[Record], prompts: Prompts) -> Shown | None:
    """Of pictures of whole scenes the tokens whose patches' centres lie in a toy's box or up to a pixel off; None without any."""
    shown = []
    for b, record in enumerate(records):
        if record.task not in SCENES:
            continue
        layout = record.task == "control"
        scene, (span,) = record.extra["truth"].scene, prompts.spans[b]
        tokens = prompts.inputs[b, span.start : span.end]
        patches = math.isqrt(len(tokens))  # on a side
        centres = (np.arange(patches) + 0.5) * SIDE / patches
        for placed, box in zip(scene.toys, boxes(scene), strict=True):
            across = (centres > box.left - 1) & (centres < box.right + 1)
            down = (centres > box.top - 1) & (centres < box.bottom + 1)
            told, numbers = names(placed, scene.style, LAYOUT if layout else tuple(KINDS)), measures(placed.toy)
            if layout:
                numbers = [x if k == ASPECT else math.nan for k, x in enumerate(numbers)]
            shown.append((tokens[np.flatnonzero(np.outer(down, across))], told, numbers))
    return _shown(shown)


def _shown(pictures: list[tuple[Tensor, list[int], list[float]]]) -> Shown | None:
    """Each one's tokens, names and measures."""
    if not pictures:
        return None
    tokens, told, numbers = zip(*pictures, strict=True)
    which = torch.arange(len(tokens)).repeat_interleave(torch.tensor([len(own) for own in tokens]))
    device = tokens[0].device
    return Shown(torch.cat(tokens), which.to(device), torch.tensor(told, device=device), torch.tensor(numbers, device=device))


def names(placed: Placed, style: str, seen: tuple[str, ...] = tuple(KINDS)) -> list[int]:
    """The numbers among their ``KINDS`` of a toy's names, its picture's style and its size, for those that are ``seen``."""
    own = [*(getattr(placed.toy, name) for name in NAMES), style, placed.size]
    return [kinds.index(name) if kind in seen else UNSEEN for (kind, kinds), name in zip(KINDS.items(), own, strict=True)]


def measures(toy: Toy) -> list[float]:
    """A toy's traits over their ranges and its first tone's red, green and blue, each from -1 to 1; not a number for a trait that it
    does not show."""
    shown = toy.traits()
    traits = [2 * (shown.get(name, math.nan) - low) / (high - low) - 1 for name, (low, high) in TRAITS.items()]
    return [*traits, *(2 * float(c) - 1 for c in toy_rgb(toy))]

"""Attention to pictures, aligned with given maps, as a term of the loss (Jin et al. 2025, Diffusion Instruction Tuning)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image as PILImage
from PIL import ImageDraw
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lightning_mmgen.losses import (
    AnsweringStep,
    DenoisingStep,
    ExponentialSchedule,
    LossTerm,
    aggregate,
    alignment,
    channels,
    counted_mean,
    min_max,
)
from lightning_mmgen.losses.alignment import Aggregation
from lightning_mmgen.models.aligner import AlignerConfig
from lightning_mmgen.models.attention import Attention, captured, choose, grid_of, heads_of, layers_of
from lightning_mmgen.models.encoder import Place
from lightning_mmgen.pipeline import to_pil
from lightning_mmgen.prompt import split
from lightning_mmgen.words import WordMatcher

from .ema import evaluation


class Looked(NamedTuple):
    """A word, or a phrase, that is to look somewhere.

    Attributes:
        name: the word.
        sample: whose it is.
        tokens: places of its tokens; of an answer's word, of the rows that predict them.
        place: the picture's tokens, where the word's row looks at them.
        target: [s, s] in [0, 1].
    """

    name: str
    sample: int
    tokens: tuple[int, ...]
    place: Place
    target: Tensor


class Aligned(NamedTuple):
    """Words, their maps and targets [n, s, s], and which of them count, [n]; a stand-in for none does not."""

    words: list[Looked]
    maps: Tensor
    targets: Tensor
    counts: Tensor


class AttentionAlignment(LossTerm):
    """Asks words to look where their targets do: L = L_0 + lambda mean_w MSE(A_w, S_w).

    In the fine-tuning of a VLM, A_w is the attention of the rows that predict a word of the answer to the tokens of the question's first
    picture, and S_w the map of this word among the targets of its row. In a generator, A_w is the UNet's cross-attention to the tokens of a
    phrase, and S_w where the record's boxes of this phrase lie (``data.regions``), or where the VLM looks. A word's rows and repeated words
    are averaged; shares are counted in even ones (1 is what a picture's token, or a pixel's, would get if all got the same), the Aligner
    makes one map of all heads, and each map is brought to [0, 1]. Where nothing matches, the term is a zero of the graph. The Aligner needs
    a row ``aligner`` in the parameter table.

    Args:
        weight: lambda, a number or a schedule; 10 in the paper.
        layers: of the language model or of the UNet, by name, pattern or place; all if none are given. One that sees pictures by
            cross-attention layers needs these: ``["*.cross_attn"]``.
        aggregation: over heads and layers, see :func:`~lightning_mmgen.losses.alignment.aggregate`.
        aligner: its size.
        match: ``exact`` words, or their ``root``.
        pos: parts of speech of the words that count (``NOUN``, ``ADJ``, ...), by a ``pipeline``; without, all but function words.
        pipeline: of spaCy, for roots and parts of speech; without one a rule cuts endings.
        target: ``data``; or, in a generator, ``vlm``: each word of the instruction, over the first picture of the prompt, which must show
            what the target shows where it does (an edit's source).
        vlm_layers: of the language model, for ``target: vlm``.
        pictures: align the picture tokens of references whose phrase has a box, too.
        pretraining: the first optimizer steps, in which the Aligner alone is trained and all else is frozen.
        every: optimizer steps between pictures of the maps; 0 for none.
        count: words in them.

    Raises:
        ValueError: an argument out of its range; DeepSpeed with ``pretraining``; targets of several sizes; layers that see no picture.
    """

    def __init__(
        self,
        weight: float | ExponentialSchedule = 10.0,
        layers: list[int | str] | None = None,
        aggregation: Aggregation = "mean",
        aligner: AlignerConfig = AlignerConfig(),
        match: Literal["exact", "root"] = "root",
        pos: tuple[str, ...] | None = None,
        pipeline: str | None = None,
        target: Literal["data", "vlm"] = "data",
        vlm_layers: list[int | str] | None = None,
        pictures: bool = False,
        pretraining: int = 0,
        every: int = 0,
        count: int = 8,
    ) -> None:
        super().__init__()
        self.schedule = weight if isinstance(weight, ExponentialSchedule) else ExponentialSchedule(weight, 0.0, 1)
        if self.schedule.start < 0 or pretraining < 0 or every < 0 or count < 1:
            raise ValueError("AttentionAlignment: weight, pretraining and every are 0 or more, and count 1 or more")
        self.layers, self.aggregation, self.config = layers, aggregation, aligner
        self.target, self.vlm_layers, self.pictures = target, vlm_layers, pictures
        self.pretraining, self.every, self.count = pretraining, every, count
        self.matcher = WordMatcher(match, pos, pipeline)
        self.names: list[str] = []
        self.maps: dict[str, Attention] = {}
        self.told: dict[str, Attention] = {}
        self.fixed: Any = None
        self.drawn = 0

    # -- what it is part of --------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.trainer, self.module = trainer, pl_module
        if self.pretraining and "DeepSpeed" in type(trainer.strategy).__name__:
            raise ValueError("AttentionAlignment: pretraining is not for DeepSpeed, which keeps gradients to itself")
        if self.target == "vlm" and not hasattr(pl_module, "denoising_step"):
            raise ValueError("AttentionAlignment: target: vlm is for a generator; a VLM learns from the data's maps")

    def parts(self, module: LightningModule) -> dict[str, nn.Module]:
        found = layers_of(_looking(module))
        self.names = choose(list(found), self.layers)
        heads = [heads_of(found[name]) for name in self.names]
        return {"aligner": nn.ModuleList(self.config.build(n) for n in channels(self.aggregation, heads))}

    @contextmanager
    def watching(self, module: LightningModule) -> Iterator[None]:
        with ExitStack() as stack:
            self.maps = stack.enter_context(captured(_looking(module), self.names))
            if self.target == "vlm":
                self.told = stack.enter_context(captured(module.encoder.language, self.vlm_layers))  # type: ignore[union-attr, arg-type]
            yield

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step < self.pretraining:
            for name, parameter in pl_module.named_parameters():
                if not name.startswith("aligner."):
                    parameter.grad = None

    # -- the term ------------------------------------------------------------------------------------------------------------

    def compute(self, step: AnsweringStep | DenoisingStep) -> dict[str, Tensor]:
        aligned = self.align(step)
        self.maps, self.told = {}, {}  # what they hold is freed with the graph
        term = counted_mean(alignment(aligned.maps, aligned.targets), aligned.counts)
        return {"alignment": self.schedule.at(self.trainer.global_step) * term}

    def align(self, step: AnsweringStep | DenoisingStep) -> Aligned:
        """The words of a step that have a target, and their maps."""
        words = self.answers(step) if isinstance(step, AnsweringStep) else self.phrases(step)
        words.sort(key=lambda word: word.place[1:])  # of one grid beside each other
        if len(sizes := {tuple(word.target.shape) for word in words}) > 1:
            raise ValueError(f"AttentionAlignment: targets of several sizes in a batch: {sorted(sizes)}")
        device, counts = next(self.module.aligner.parameters()).device, [True] * len(words)  # type: ignore[union-attr]
        if not words:
            words, counts = [Looked("", 0, (0,), Place(0, 1, 1), torch.zeros(2, 2))], [False]
        targets = torch.stack([word.target.to(device, torch.float32) for word in words])
        layers = [self.layer_maps(step, name, words, targets.shape[-1]).to(device) for name in self.names]
        maps = aggregate(layers, list(self.module.aligner), self.aggregation)  # type: ignore[arg-type]
        return Aligned(words, maps, targets, torch.tensor(counts, device=device))

    def layer_maps(self, step: AnsweringStep | DenoisingStep, name: str, words: list[Looked], side: int) -> Tensor:
        """What a layer's heads make of the words, [n, heads, side, side]."""
        record = self.maps.get(name)
        if isinstance(step, DenoisingStep):
            assert record is not None
            return pixel_maps(record, words, side, (step.z_t.shape[2], step.z_t.shape[3]))
        pictures = step.prompts.pictures
        if record is None:  # a cross-attention layer, passed by where the batch has no picture
            heads = heads_of(layers_of(_looking(self.module))[name])
            return step.logits.sum() * step.logits.new_zeros(len(words), heads, side, side)
        if pictures is not None and record.size[2] != pictures.shape[1]:
            raise ValueError(f"AttentionAlignment: layer {name} sees no picture; choose cross-attention layers (layers: ['*.cross_attn'])")
        return token_maps(record, words, side)

    def answers(self, step: AnsweringStep) -> list[Looked]:
        """The answers' words that have a target, in prompts with a picture."""
        out = []
        tokenizer = self.module.encoder.tokenizer  # type: ignore[union-attr]
        for b, targets in enumerate(step.batch.targets or []):
            if not targets or not step.prompts.columns[b] or not (at := step.answered[b].nonzero().flatten().tolist()):
                continue
            words = self.matcher.words(step.tokens[b, at[0] : at[-1] + 1].tolist(), tokenizer)
            for name, found in self.matcher.matched(words, targets).items():
                rows = tuple(at[0] + token - 1 for word in found for token in word.tokens)
                out.append(Looked(name, b, rows, step.prompts.columns[b][0], targets[name]))
        return out

    def phrases(self, step: DenoisingStep) -> list[Looked]:
        """The instructions' phrases that have a target."""
        batch, encoder = step.batch, self.module.encoder
        grids = _grids(step, encoder)
        counts = encoder.counts(batch.markers, batch.references)  # type: ignore[union-attr, operator]
        out = []
        for b, (text, markers) in enumerate(zip(batch.instructions, batch.markers, strict=True)):
            spans = step.condition.spans[b]
            shown = (markers, counts[b]) if spans else ([], [])
            ids, _ = encoder.tokenise(text, *shown)  # type: ignore[union-attr, operator]
            words = self.matcher.words(ids, encoder.tokenizer)  # type: ignore[union-attr]
            if self.target == "vlm" and spans:
                first = next(slot for _, slot in split(text, markers) if slot is not None)
                place = Place(spans[first].start, *grids[b, first])
                own = [Looked(word.text, b, word.tokens, place, torch.zeros(0)) for word in words]
                out += [word._replace(target=told) for word, told in zip(own, self.vlm_maps(own), strict=True)]
            for phrase, target in (batch.regions or [{}] * batch.size)[b].items() if self.target == "data" else ():
                if said := self.matcher.phrases(words, phrase):
                    out.append(Looked(phrase, b, tuple(token for of in said for token in of), Place(0, 1, 1), target))
                names = batch.phrases[b] if batch.phrases and self.pictures else []
                seen = [range(*span) for span, own in zip(spans, names, strict=False) if own.lower() == phrase.lower()]
                out += [Looked(f"{phrase} (picture)", b, tuple(span), Place(0, 1, 1), target) for span in seen]
        return out

    @torch.no_grad()
    def vlm_maps(self, words: list[Looked]) -> Tensor:
        """Where the VLM's words look in the picture, the mean of its layers and heads, in [0, 1], [n, s, s]."""
        side = max(words[0].place.rows, words[0].place.columns) if words else 1
        maps = [token_maps(record, words, side).mean(1) for record in self.told.values()] if words else []
        return min_max(torch.stack(maps).mean(0)) if maps else torch.zeros(0, 1, 1)

    # -- pictures of it ------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.fixed is None and self.every:
            self.fixed = batch  # the first of a run

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.every and self.fixed is not None and trainer.global_step % self.every == 0 and trainer.global_step != self.drawn:
            self.drawn = trainer.global_step
            self.draw()

    def draw(self) -> None:
        """The maps of the fixed batch over its pictures, beside their targets, to TensorBoard."""
        with evaluation(self.trainer, self.module):
            taken = self.module.answering_step if hasattr(self.module, "answering_step") else self.module.denoising_step
            step = taken(self.fixed)  # type: ignore[operator]
            aligned = self.align(step)
        self.maps, self.told = {}, {}
        words = [(i, word) for i, word in enumerate(aligned.words) if aligned.counts[i]][: self.count]
        if not words or not self.trainer.is_global_zero:
            return
        rows = [(word.name, shown(step.batch, word.sample), aligned.maps[i], aligned.targets[i]) for i, word in words]
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("attention", np.asarray(page(rows)), self.trainer.global_step, dataformats="HWC")


def token_maps(record: Attention, words: Sequence[Looked], side: int) -> Tensor:
    """Where the rows of words look in their picture: the mean of each word's rows, [n, heads, side, side], in even shares."""
    owner, sample, token = _flat(words, record.queries.device)
    rows = _mean(record.rows(sample, token), owner, len(words))  # [n, heads, m]
    maps, at = [], 0
    while at < len(words):
        (_, height, width), same = words[at].place, at
        while same < len(words) and words[same].place[1:] == (height, width):
            same += 1
        starts = torch.tensor([word.place.start for word in words[at:same]], device=rows.device)
        columns = starts[:, None] + torch.arange(height * width, device=rows.device)
        own = rows[at:same].take_along_dim(columns[:, None], 2) * rows.shape[2]
        maps.append(_resized(own.view(same - at, -1, height, width), side))
        at = same
    return torch.cat(maps)


def pixel_maps(record: Attention, words: Sequence[Looked], side: int, latents: tuple[int, int]) -> Tensor:
    """What the tokens of words get of each pixel: the mean of each word's tokens, [n, heads, side, side], in even shares."""
    owner, sample, token = _flat(words, record.queries.device)
    columns = _mean(record.columns(sample, token), owner, len(words)) * record.size[2]  # [n, heads, pixels]
    return _resized(columns.view(*columns.shape[:2], *grid_of(columns.shape[2], latents)), side)


def shown(batch: Any, sample: int) -> Tensor:
    """The picture that the maps of a sample lie over, [3, h, w] in [-1, 1]: a generator's target, or the first of a question."""
    if hasattr(batch, "target"):
        return batch.target[sample]  # type: ignore[no-any-return]
    slot = next(slot for _, slot in split(batch.instructions[sample], batch.markers[sample]) if slot is not None)
    return next(
        group.pixels[i]
        for group in batch.references
        for i in range(len(group.pixels))
        if (int(group.sample[i]), int(group.slot[i])) == (sample, slot)
    )


def page(rows: Sequence[tuple[str, Tensor, Tensor, Tensor]], cell: int = 128, columns: int = 2) -> PILImage.Image:
    """Words with their picture, the map over it and the target over it; red is 1."""
    width, height = 3 * cell, cell + 14
    sheet = PILImage.new("RGB", (min(columns, len(rows)) * (width + 8), -(-len(rows) // columns) * height), "white")
    for i, (name, picture, *maps) in enumerate(rows):
        x, y = (i % columns) * (width + 8), (i // columns) * height
        ImageDraw.Draw(sheet).text((x + 2, y + 1), f"{name}: attention, target", "black")
        large = _resized(picture[None].float(), cell).clamp(-1, 1)
        red = torch.tensor([1.0, -1.0, -1.0], device=large.device)[:, None, None]
        heats = [_resized(m[None, None].float(), cell)[0].clamp(0, 1) * 0.7 for m in maps]
        for k, over in enumerate([large[0], *((1 - heat) * large[0] + heat * red for heat in heats)]):
            sheet.paste(to_pil(over[None].cpu())[0], (x + k * cell, y + 14))
    return sheet


def _looking(module: Any) -> nn.Module:
    """The part whose attention is aligned."""
    return module.unet if hasattr(module, "unet") else module.encoder.language  # type: ignore[no-any-return]


def _grids(step: DenoisingStep, encoder: Any) -> dict[tuple[int, int], tuple[int, int]]:
    """How the tokens of each reference's picture lie, by sample and slot."""
    return {
        key: encoder.grid_of(*group.pixels.shape[-2:])
        for group in step.batch.references
        for key in zip(group.sample.tolist(), group.slot.tolist(), strict=True)
    }


def _flat(words: Sequence[Looked], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The index, sample and place of every token of words, [k] each."""
    flat = [(i, word.sample, token) for i, word in enumerate(words) for token in word.tokens]
    owner, sample, token = torch.tensor(flat, device=device).T
    return owner, sample, token


def _mean(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Means of the rows [k, ...] of each owner, [count, ...]."""
    share = 1 / torch.bincount(owner, minlength=count)[owner].to(values.dtype)
    return values.new_zeros(count, *values.shape[1:]).index_add(0, owner, values * share[:, None, None])


def _resized(maps: Tensor, side: int) -> Tensor:
    """Maps [n, c, h, w] at [n, c, side, side]."""
    if maps.shape[-2:] == (side, side):
        return maps
    return interpolate(maps, (side, side), mode="bilinear", antialias=True)

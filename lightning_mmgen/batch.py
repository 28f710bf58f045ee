"""What travels between the rooms: a batch, packed reference pictures, and the condition that an encoder makes of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class PackedImages(NamedTuple):
    """References of one size, packed: no sample is padded to the most references per sample.

    Attributes:
        pixels: [n, 3, h, w] in [-1, 1].
        sample: [n], which sample of the batch each belongs to.
        slot: [n], which reference of that sample (index, not marker).
        patches: [n, m, d], what the encoder's vision tower makes of them, where it is known beforehand.
    """

    pixels: Tensor
    sample: Tensor
    slot: Tensor
    patches: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedImages:
        """With every tensor changed."""
        patches = None if self.patches is None else change(self.patches)
        return PackedImages(change(self.pixels), change(self.sample), change(self.slot), patches)

    def take(self, rows: Tensor) -> PackedImages:
        """The pictures where ``rows`` [n] is True."""
        return self.map(lambda t: t[rows])


class Edit(NamedTuple):
    """What an edit starts from and what it may change. A sample that is no edit has its target as source and a mask of ones.

    Attributes:
        source: [b, 3, h, w] in [-1, 1], of the target's size.
        mask: [b, 1, h, w] in [0, 1], 1 where the edit may change the source.
        turn: [b] int64, place in a multi-turn edit, from 0; -1 where the sample is no edit.
        shown: [b], whether the UNet may see the source; not where the references were dropped.
    """

    source: Tensor
    mask: Tensor
    turn: Tensor
    shown: Tensor

    def seen(self, source: Tensor) -> Tensor:
        """The sources' latents [b, c, h, w] as the UNet gets them: zeros where it may not see one."""
        return source * self.shown.view(-1, 1, 1, 1)

    @property
    def visible(self) -> Tensor:
        """The samples that are edits and whose source the UNet sees, [b]."""
        return self.shown & (self.turn >= 0)


class Moments(NamedTuple):
    """Mean and log-variance of the VAE's posterior, known beforehand: of targets and of sources [b, 2c, h, w]; None where one of
    them is not."""

    target: Tensor | None = None
    source: Tensor | None = None


class Batch(NamedTuple):
    """Samples of equal target size.

    Attributes:
        instructions: b texts with ``[ref#k]`` markers.
        markers: for each text, the markers of its references in the order of their slots.
        references: one group a picture size.
        target: [b, 3, h, w] in [-1, 1].
        captions: b plain captions ("" where none), for CLIP scores.
        ids: b names of the rows; none where the batch stands in for bad rows, and its loss is zero.
        seed: [b] int64, from which all noise of a sample is drawn.
        bare: what is left of each instruction without its references; by default its words without the markers.
        phrases: for each text, the phrases of its references by slot; by default empty ones.
        edit: sources and masks, where a sample is an edit.
        regions: for each sample, where phrases lie in the target: phrase -> map [s, s] in [0, 1]; None where nobody asks.
        moments: what the VAE makes of targets and sources, where it is known beforehand.
        sizes: [b, 6], SDXL's original size, top left corner of the crop and size of the target, each height first; by default the
            target's size, and no crop.
        descriptions: b texts that say all that is known of the target ("" where nothing); by default the captions.
        foils: b descriptions of what the targets are not ("" where none).
    """

    instructions: list[str]
    markers: list[list[int]]
    references: list[PackedImages]
    target: Tensor
    captions: list[str]
    ids: list[str]
    seed: Tensor
    bare: list[str] | None = None
    phrases: list[list[str]] | None = None
    edit: Edit | None = None
    regions: list[dict[str, Tensor]] | None = None
    moments: Moments | None = None
    sizes: Tensor | None = None
    descriptions: list[str] | None = None
    foils: list[str] | None = None

    @property
    def size(self) -> int:
        """The number of samples b."""
        return len(self.instructions)

    @property
    def edits(self) -> Edit:
        """``edit``; where there is none, one in which no sample is an edit. A term of the loss that counts over all ranks asks for this."""
        if self.edit is not None:
            return self.edit
        mask, turn = torch.ones_like(self.target[:, :1]), torch.full_like(self.seed, -1)
        return Edit(self.target, mask, turn, torch.zeros_like(turn, dtype=torch.bool))


class QuestionBatch(NamedTuple):
    """Questions about pictures, and their answers.

    Attributes:
        instructions: b questions with ``[ref#k]`` markers, as the records have them: not yet in the words of a model's chat template.
        markers: for each question, the markers of its pictures in the order of their slots.
        references: one group a picture size.
        answers: b texts.
        ids: b names of the rows; none where the batch stands in for bad rows, and its loss is zero.
        seed: [b] int64, from which all that is random about a sample is drawn.
        targets: for each question, where its words look: word -> map [s, s] in [0, 1] of its first picture; None where the data have none.
    """

    instructions: list[str]
    markers: list[list[int]]
    references: list[PackedImages]
    answers: list[str]
    ids: list[str]
    seed: Tensor
    targets: list[dict[str, Tensor]] | None = None

    @property
    def size(self) -> int:
        """The number of samples b."""
        return len(self.instructions)


class Span(NamedTuple):
    """The rows ``start <= i < end`` of a token sequence that hold one reference's picture."""

    start: int
    end: int


class Context(NamedTuple):
    """What the UNet's own encoder makes of the references of b samples, at its lowest level.

    Attributes:
        tokens: [b, m, width], the features of all references of a sample, one after the other.
        mask: [b, m], True where a token is real; nowhere for a sample without references.
    """

    tokens: Tensor
    mask: Tensor


class Condition(NamedTuple):
    """What the UNet attends to.

    Attributes:
        tokens: [b, n, d].
        mask: [b, n], True where a token is real.
        spans: for each sample, the span of each reference (by slot; of its first marker).
        pooled: [b, p], SDXL's pooled vector, after the adapter.
        lengths: real tokens of each sample, padded on the right; None where that is left to the mask.
        context: the references as the UNet's own encoder sees them; None where they do not go through it.
        source: [b, c, h, w], latents beside z_t for a UNet that takes them (InstructPix2Pix, section 3.2); None or zeros: no source.
        sizes: [b, 6], as in :class:`Batch`.
    """

    tokens: Tensor
    mask: Tensor
    spans: list[list[Span]]
    pooled: Tensor | None = None
    lengths: list[int] | None = None
    context: Context | None = None
    source: Tensor | None = None
    sizes: Tensor | None = None


def pack(pictures: list[list[Tensor]], patches: Callable[[Tensor], Tensor | None] = lambda _: None) -> list[PackedImages]:
    """Pack each sample's pictures ([3, h, w], any sizes) into one group a size, in order of first appearance; those whose ``patches`` are
    known apart from others."""
    groups: dict[tuple[int, ...], list[tuple[Tensor, int, int, Tensor | None]]] = {}
    for sample, images in enumerate(pictures):
        for slot, image in enumerate(images):
            known = patches(image)
            groups.setdefault((*image.shape, known is not None), []).append((image, sample, slot, known))
    out = []
    for group in groups.values():
        images, samples, slots, found = (list(column) for column in zip(*group, strict=True))
        together = None if found[0] is None else torch.stack(found)
        out.append(PackedImages(torch.stack(images), torch.tensor(samples), torch.tensor(slots), together))
    return out

"""Probes of what a similarity score cannot tell: whether a model reads its references, copies them, reads its words.

*Ignored reference* and *instruction sensitivity* change one thing of a prompt (:func:`hide`, :func:`reword`), draw it again with the same
noise, and ask how far the picture moves (:class:`Movement`). *Copy-paste* needs no second picture (:class:`CopyPaste`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from PIL import Image as PILImage
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import interpolate, unfold

from ..data.images import crop_square, open_picture, pixels
from ..models.features import Features, as_features
from ..prompt import Record
from .mean import PictureMean
from .regions import LIKENESSES

Hiding = Literal["blank", "shuffle", "swap"]
TILES = 4

WORDS = (
    ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white", "grey", "cyan", "magenta"),
    ("left", "right"),
    ("above", "below"),
    ("top", "bottom"),
    ("small", "large"),
    ("one", "two", "three", "four", "five"),
    ("man", "woman"),
    ("boy", "girl"),
    ("dog", "cat", "horse", "bird"),
    ("day", "night"),
    ("summer", "winter"),
    ("beach", "snow", "jungle", "street"),
    ("striped", "dotted", "checked", "solid"),
    ("circle", "square", "triangle", "star", "diamond", "hexagon"),
)
"""Groups of words of which one may stand for another."""


def hide(record: Record, slot: int, how: Hiding = "blank", other: Record | None = None) -> Record:
    """The record with one reference hidden.

    Args:
        slot: which reference, by its index.
        how: ``blank`` (mid-grey), ``shuffle`` (its own pixels, 4 x 4 tiles in another order), or ``swap`` (a reference of ``other``: the
            first of its role, else the first).

    Raises:
        ValueError: ``swap`` without another record that has a reference.
    """
    reference = record.references[slot]
    image = open_picture(reference.image)
    if how == "swap":
        if other is None or not other.references:
            raise ValueError("a reference is swapped with one of another record")
        picture = next((r for r in other.references if r.role == reference.role), other.references[0]).image
    else:
        picture = PILImage.new("RGB", image.size, (128, 128, 128)) if how == "blank" else _shuffled(image)
    references = list(record.references)
    references[slot] = replace(reference, image=picture)
    return replace(record, references=tuple(references))


def _shuffled(image: Image) -> Image:
    """Tiles of the picture in an order that leaves none in its place: the same one always."""
    w, h = (max(length // TILES, 1) for length in image.size)
    spots = [(x * w, y * h) for y in range(TILES) for x in range(TILES)]
    order = np.random.default_rng(0).permutation(len(spots))
    out = image.copy()
    for i, k in zip(order, np.roll(order, 1), strict=True):  # one cycle through all of them
        x, y = spots[k]
        out.paste(image.crop((x, y, x + w, y + h)), spots[i])
    return out


def reword(record: Record) -> Record | None:
    """The record with one word of its instruction changed: the first that is in :data:`WORDS`, for the next of its group; None where there
    is none."""
    for match in re.finditer(r"[A-Za-z]+", record.instruction):
        word = match[0].lower()
        if group := next((g for g in WORDS if word in g), None):
            new = group[(group.index(word) + 1) % len(group)]
            text = record.instruction[: match.start()] + new + record.instruction[match.end() :]
            return replace(record, instruction=text)
    return None


class Movement(PictureMean):
    """How far pictures move when their prompt changes and their noise does not: the mean absolute difference of pixels in [0, 1].

    0 where what changed is not read at all. Inside the region of a reference it says that the reference is read; outside it, what else
    hangs on it.

    Args:
        where: ``whole`` picture, or ``inside`` or ``outside`` of a region.
    """

    def __init__(self, where: Literal["whole", "inside", "outside"] = "whole") -> None:
        super().__init__()
        self.where = where

    def score(self, pictures: Tensor, redrawn: Tensor, masks: Tensor | None = None) -> Tensor:
        """Of pictures before and after, each [b, 3, H, W] in [-1, 1], and the regions [b, 1, H, W] in [0, 1], [b]; nan where the region, or
        what is outside it, is empty, and both where it is not known (a mask of zeros).

        Raises:
            ValueError: masks are missing.
        """
        moved = ((pictures - redrawn).abs() / 2).mean(1, keepdim=True)  # [b, 1, H, W]
        if self.where == "whole":
            return moved.mean((1, 2, 3))
        if masks is None:
            raise ValueError(f"movement {self.where} a region needs its masks")
        weights = masks if self.where == "inside" else 1 - masks
        mean = (moved * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3))
        return mean.where(masks.flatten(1).any(1), torch.nan)


class CopyPaste(PictureMean):
    """How much more of its references a picture repeats than its target does: of each patch of a reference the nearest of the picture,
    the mean of their similarities, less that of the target with the same reference. Averaged over the references of a picture.

    0 for the target itself, positive for a paste, negative for a picture that is less like the reference than the target is. A picture with
    no target has none.

    Args:
        pretrained: a DINO or a CLIP by name or folder, whose patches are compared by cosine; None compares patches of 1/8 of the picture's
            side by 1 - their mean absolute difference.
    """

    SIDES = 8  # patches a side, of pixels

    def __init__(self, pretrained: str | Features | None = None) -> None:
        super().__init__()
        self.features = None if pretrained is None else as_features(pretrained)

    def score(self, pictures: Tensor, records: Sequence[Record]) -> Tensor:
        """Of pictures [b, 3, H, W] in [-1, 1] and their records, [b]; nan where no reference or no target is to compare with."""
        out = pictures.new_full((len(pictures),), torch.nan, dtype=torch.float32)
        shown = {i: [x.image for x in r.references if x.role in LIKENESSES] for i, r in enumerate(records) if r.target is not None}
        if not (shown := {i: images for i, images in shown.items() if images}):
            return out
        side, at = min(pictures.shape[-2:]), [*shown]
        targets = [crop_square(pixels(records[i].target), side) for i in at]  # type: ignore[arg-type]
        references = [pixels(image, side) for images in shown.values() for image in images]
        of = torch.tensor([k for k, images in enumerate(shown.values()) for _ in images], device=pictures.device)
        drawn = torch.stack([crop_square(picture, side) for picture in pictures[at]])
        own, others = self._nearest(torch.stack(references).to(drawn), torch.stack(targets).to(drawn), drawn, of)
        total = torch.zeros(len(at), device=pictures.device).index_add(0, of, own - others)
        out[at] = total / of.bincount()
        return out

    @torch.no_grad()
    def _nearest(self, references: Tensor, targets: Tensor, drawn: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the patches of each reference of the similarity with the nearest patch of its picture, and of its target, [r] each.

        Args:
            references: [r, 3, s, s].
            targets, drawn: [p, 3, s, s].
            of: the picture of each reference, [r].
        """
        r, p, every = len(references), len(drawn), torch.cat([references, drawn, targets])
        if self.features is not None:
            patches = self.features.patches(every)  # [r + 2 p, n, d]
            few, many = patches[:r], (patches[r : r + p], patches[r + p :])
            drawn_nearest, target_nearest = ((few @ some[of].mT).amax(-1).mean(-1) for some in many)
            return drawn_nearest, target_nearest
        small, size = interpolate(every.float(), (64, 64), mode="bilinear", antialias=True), 64 // self.SIDES
        few = unfold(small[:r], size, stride=size).mT  # [r, n, 3 s s]
        patches = unfold(small[r:], size, stride=size // 2).mT  # [2 p, m, 3 s s]
        own, others = (1 - torch.cdist(few, some[of], p=1).amin(-1) / (2 * few.shape[-1]) for some in (patches[:p], patches[p:]))
        return own.mean(-1), others.mean(-1)

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
        return torch.stack([self._excess(p, r) for p, r in zip(pictures, records, strict=True)])

    @torch.no_grad()
    def _excess(self, picture: Tensor, record: Record) -> Tensor:
        shown = [r.image for r in record.references if r.role in LIKENESSES]
        if not shown or record.target is None:
            return picture.new_tensor(torch.nan)
        side = min(picture.shape[-2:])
        target = crop_square(pixels(record.target), side).to(picture.device)
        drawn = picture if picture.shape == target.shape else crop_square(picture, side)
        references = torch.stack([pixels(image, side).to(picture.device) for image in shown])
        own, others = self._nearest(references, torch.stack([drawn, target]))
        return (own - others).mean()

    def _nearest(self, references: Tensor, pictures: Tensor) -> Tensor:
        """Mean over the patches of each reference [r, 3, s, s] of the similarity with the nearest patch of each picture [p, 3, s, s],
        [p, r]."""
        r, every = len(references), torch.cat([references, pictures])
        if self.features is not None:
            patches = self.features.patches(every)  # [r + p, n, d]
            return (patches[:r] @ patches[r:, None].mT).amax(-1).mean(-1)
        small, size = interpolate(every.float(), (64, 64), mode="bilinear", antialias=True), 64 // self.SIDES
        few = unfold(small[:r], size, stride=size).mT  # [r, n, 3 s s]
        many = unfold(small[r:], size, stride=size // 2).mT[:, None]  # [p, 1, m, 3 s s]
        return (1 - torch.cdist(few, many, p=1).amin(-1) / (2 * few.shape[-1])).mean(-1)

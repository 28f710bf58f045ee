"""Where in a generated picture an object of its prompt is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from ..data.images import Edges, picture_size, square_around
from ..prompt import Box, Record, Reference

if TYPE_CHECKING:
    from ..build.detector import Detector

OBJECTS = ("subject", "crop")
"""Roles of references that show one object of the picture."""
LIKENESSES = (*OBJECTS, "content", "source")
"""Roles of references that the picture is to look like; a style, a layout or a neighbour is none."""


class Regions(Protocol):
    """Finds the objects that references show."""

    def __call__(self, pictures: Tensor, records: Sequence[Record]) -> list[list[Edges | None]]:
        """Of each picture [3, H, W] of a stack, the box of each reference (by slot) in its pixels; None where it is not known."""


class RecordBoxes:
    """The boxes that records have: where each object lies in the target. A picture that follows another layout has it elsewhere.

    A reference's box is the one of its phrase (the second reference of a phrase takes the second box of it). Where no phrase agrees and
    there are as many boxes as references that show an object, they go together in their order.

    Args:
        kind: ``"head"`` takes a person's head rather than the person.
    """

    def __init__(self, kind: Literal["", "head"] = "") -> None:
        self.kind = kind

    def __call__(self, pictures: Tensor, records: Sequence[Record]) -> list[list[Edges | None]]:
        h, w = pictures.shape[-2:]
        return [self._of(record, h, w) for record in records]

    def _of(self, record: Record, h: int, w: int) -> list[Edges | None]:
        if not record.boxes or record.target is None:
            return [None] * len(record.references)
        chosen, size = self._pair(record), picture_size(record.target)
        return [None if box is None else in_square(box, size, h, w) for box in chosen]

    def _pair(self, record: Record) -> list[Box | None]:
        """The box of each reference."""
        heads = {b.phrase for b in record.boxes if b.kind == "head"} if self.kind == "head" else set()
        boxes = [b for b in record.boxes if (b.kind == "head") == (b.phrase in heads)]
        objects = [r for r in record.references if r.role in OBJECTS]
        if not {r.phrase for r in objects} & {b.phrase for b in boxes}:
            paired = dict(zip((r.marker for r in objects), boxes, strict=False)) if len(objects) == len(boxes) else {}
            return [paired.get(r.marker) for r in record.references]
        left = list(boxes)
        return [_take(left, r) if r in objects else None for r in record.references]


def _take(boxes: list[Box], reference: Reference) -> Box | None:
    """The first box of the reference's phrase, taken out of the list."""
    found = next((i for i, box in enumerate(boxes) if box.phrase == reference.phrase), None)
    return None if found is None else boxes.pop(found)


def in_square(box: Box, size: tuple[int, int], h: int, w: int) -> Edges | None:
    """A box of a picture of ``size`` (width, height) in pixels of its middle square, drawn at h x w; None where nothing of it is left."""
    side, (x, y, *_) = min(size), square_around(size, ())
    left, right = (min(max((edge - x) / side, 0), 1) * w for edge in (box.left, box.right))
    top, bottom = (min(max((edge - y) / side, 0), 1) * h for edge in (box.top, box.bottom))
    return (left, top, right, bottom) if right - left >= 1 and bottom - top >= 1 else None


class Detected:
    """What a detector finds of the references' phrases: of each the best box.

    Args:
        detector: any GroundingDINO of ``transformers``.
    """

    def __init__(self, detector: Detector) -> None:
        self.detector = detector

    def __call__(self, pictures: Tensor, records: Sequence[Record]) -> list[list[Edges | None]]:
        from ..pipeline import to_pil

        h, w = pictures.shape[-2:]
        found = self.detector.detect(to_pil(pictures.nan_to_num()), [[r.phrase for r in record.references] for record in records])
        out: list[list[Edges | None]] = [[None] * len(record.references) for record in records]
        for row, detections in zip(out, found, strict=True):
            for d in reversed(detections):  # the best score last
                left, right, top, bottom = max(d.left, 0.0), min(d.right, w), max(d.top, 0.0), min(d.bottom, h)
                if right - left >= 1 and bottom - top >= 1:
                    row[d.phrase] = (left, top, right, bottom)
        return out


def cut(picture: Tensor, edges: Edges | None) -> Tensor:
    """The box of a picture [3, h, w], or all of it."""
    if edges is None:
        return picture
    left, top, right, bottom = (round(e) for e in edges)
    return picture[:, top : max(bottom, top + 1), left : max(right, left + 1)]


def region_masks(regions: Sequence[Edges | None], h: int, w: int) -> Tensor:
    """[b, 1, h, w], 1 inside each box; nowhere 1 where there is none."""
    masks = torch.zeros(len(regions), 1, h, w)
    for mask, edges in zip(masks, regions, strict=True):
        if edges is not None:
            left, top, right, bottom = (round(e) for e in edges)
            mask[:, top:bottom, left:right] = 1
    return masks

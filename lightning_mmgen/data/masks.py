"""Edit masks out of pairs of pictures that come without one; and where phrases lie in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Resampling
from scipy.ndimage import distance_transform_edt, label
from torch import Tensor

from ..prompt import Box
from .images import open_picture, square_around


def difference_mask(source: Tensor, target: Tensor, threshold: float = 0.1, dilate: float = 2.0, min_area: int = 16) -> Tensor:
    """Where an edit has changed its source: the difference of the colours, thresholded; small components dropped; the rest dilated.

    Args:
        source, target: [3, h, w] in [-1, 1].
        threshold: of the channel that changes most, as a share of its range; 0.1 is 26 of 255 levels, over the noise of JPEG.
        dilate: radius in pixels.
        min_area: pixels of the smallest change; fewer, joined by sides or corners, are noise.

    Returns:
        [1, h, w], 1 where it has changed, else 0.

    Raises:
        ValueError: the pictures differ in size.
    """
    if source.shape != target.shape:
        raise ValueError(f"source of {_size(source)} pixels, target of {_size(target)}")
    changed = ((target - source).abs().amax(0) / 2 > threshold).numpy()
    components, _ = label(changed, np.ones((3, 3)))
    large = np.bincount(components.ravel()) >= min_area
    large[0] = False  # what has not changed
    kept = large[components]
    if kept.any():
        kept = distance_transform_edt(~kept) <= dilate
    return torch.from_numpy(kept).float()[None]


def regions(boxes: Sequence[Box], size: tuple[int, int], side: int, root: Path | None = None) -> dict[str, Tensor]:
    """Where the boxes of each phrase, or their masks where they have some, lie in the square in the middle of a picture.

    Args:
        size: width and height of the picture in pixels.
        side: of the maps.

    Returns:
        phrase -> [side, side] in [0, 1]: the share of each cell that they cover; phrases of which nothing is inside are left out.

    Raises:
        RecordError: a mask cannot be read.
    """
    left, top, right, bottom = square_around(size, ())
    maps: dict[str, Tensor] = {}
    for box in boxes:
        if box.mask is None:
            x = _covered(box.left - left, box.right - left, right - left, side)
            own = _covered(box.top - top, box.bottom - top, bottom - top, side)[:, None] * x
        else:
            mask = open_picture(box.mask, root).convert("L").resize(size).crop((left, top, right, bottom))
            own = torch.from_numpy(np.asarray(mask.resize((side, side), Resampling.BOX), np.float32) / 255)
        if own.any():
            maps[box.phrase] = torch.maximum(own, maps.get(box.phrase, own))
    return maps


def _covered(low: float, high: float, length: int, cells: int) -> Tensor:
    """The share of each of so many cells of a line that lies between two points of it."""
    ends = torch.linspace(0, length, cells + 1)
    return (ends[1:].clamp(max=high) - ends[:-1].clamp(min=low)).clamp(min=0) * cells / length


def _size(picture: Tensor) -> str:
    return f"{picture.shape[-1]} x {picture.shape[-2]}"

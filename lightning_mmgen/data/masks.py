"""Edit masks out of pairs of pictures that come without one."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt, label
from torch import Tensor


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


def _size(picture: Tensor) -> str:
    return f"{picture.shape[-1]} x {picture.shape[-2]}"

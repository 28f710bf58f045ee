from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_mmgen.data.images import pixels
from lightning_mmgen.data.masks import difference_mask
from lightning_mmgen.toybox.tasks import edit

GREY = torch.zeros(3, 20, 24)


def painted(*places: tuple[slice, slice], by: float = 1.0) -> Tensor:
    picture = GREY.clone()
    for rows, columns in places:
        picture[1, rows, columns] += by
    return picture


def local_edits(seed: int, count: int) -> Iterator[tuple[Tensor, Tensor, NDArray[np.bool_]]]:
    """Source, target and true mask of edits of one toy."""
    rng = np.random.default_rng(seed)
    while count:
        record = edit(rng, False)
        assert record.target is not None and record.mask is not None
        if not (mask := np.asarray(record.mask) > 0).all():
            yield pixels(record.references[0].image), pixels(record.target), mask
            count -= 1


def distances(points: NDArray[np.bool_]) -> NDArray[np.float64]:
    """From each pixel to the nearest of the points, by trying all."""
    y, x = np.indices(points.shape)
    out = np.full(points.shape, np.inf)
    for a, b in np.argwhere(points):
        out = np.minimum(out, np.hypot(y - a, x - b))
    return out


def components(points: NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    """Groups of pixels joined by sides or corners, by flooding."""
    left, out = {(int(a), int(b)) for a, b in np.argwhere(points)}, []
    while left:
        group, queue = [], deque([left.pop()])
        while queue:
            y, x = queue.popleft()
            group.append((y, x))
            near = {(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            queue.extend(near)
        out.append(group)
    return out


@pytest.mark.parametrize(("threshold", "dilate", "min_area"), [(0.1, 2.0, 8), (0.03, 0.0, 1), (0.2, 3.5, 30)])
def test_on_edits_the_mask_is_what_a_plain_search_finds(threshold: float, dilate: float, min_area: int) -> None:
    for source, target, _ in local_edits(3, 8):
        changed = ((source - target).abs().amax(0) / 2 > threshold).numpy()
        large = np.zeros_like(changed)
        for group in components(changed):
            if len(group) >= min_area:
                large[tuple(zip(*group, strict=True))] = True
        found = difference_mask(source, target, threshold, dilate, min_area)
        assert found.shape == (1, 64, 64) and found.dtype == torch.float32
        expected = distances(large) <= dilate
        assert np.array_equal(found[0].numpy() == 1, expected) and set(found.unique().tolist()) <= {0.0, 1.0}


def test_the_mask_of_an_edit_covers_its_changes_and_spills_by_its_dilation_only() -> None:
    covered = missed = 0
    for source, target, true in local_edits(0, 40):
        found = difference_mask(source, target)[0].numpy() == 1
        changed = true & ((source - target).abs().amax(0) / 2 > 0.1).numpy()
        covered, missed = covered + int((changed & found).sum()), missed + int((changed & ~found).sum())
        assert not (found & (distances(true) > 2)).any()
    assert covered > 5_000 and missed / covered < 1e-2  # what is missed is too small


def test_small_and_faint_changes_are_noise() -> None:
    large, speck = (slice(2, 6), slice(3, 7)), (slice(15, 16), slice(10, 14))
    found = difference_mask(GREY, painted(large, speck), dilate=0)
    assert found.sum() == 16 and found[0][large].all()
    assert difference_mask(GREY, painted(large, speck), dilate=0, min_area=4).sum() == 16 + 4
    assert not difference_mask(GREY, painted(large, by=0.19)).any()
    assert difference_mask(GREY, painted(large, by=0.21)).any()


def test_pieces_that_touch_at_a_corner_are_one() -> None:
    touching = painted((slice(2, 4), slice(2, 4)), (slice(4, 6), slice(4, 6)))
    apart = painted((slice(2, 4), slice(2, 4)), (slice(5, 7), slice(4, 6)))
    assert difference_mask(GREY, touching, dilate=0, min_area=8).sum() == 8
    assert not difference_mask(GREY, apart, dilate=0, min_area=8).any()


def test_equal_pictures_have_an_empty_mask_and_opposite_ones_a_full_one() -> None:
    assert not difference_mask(GREY, GREY, threshold=0.0).any()
    assert difference_mask(GREY - 1, GREY + 1).all()


def test_pictures_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="source of 24 x 20 pixels, target of 20 x 24"):
        difference_mask(GREY, GREY.transpose(1, 2))

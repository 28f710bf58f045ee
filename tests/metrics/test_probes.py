from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor

from lightning_mmgen.data.images import pixels
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.metrics import CopyPaste, Movement
from lightning_mmgen.metrics.probes import hide, reword
from lightning_mmgen.prompt import Record, Reference

TOYBOX = ToyboxSource({"subject": 1.0}, 8, held_out=True)
RECORDS = [TOYBOX.record(i) for i in range(8)]


def stack(images: list[object]) -> Tensor:
    return torch.stack([pixels(image, 64) for image in images])  # type: ignore[arg-type]


def test_hiding_changes_one_reference_and_nothing_else() -> None:
    record = next(r for r in RECORDS if len(r.references) == 2)
    shown = [np.asarray(r.image) for r in record.references]
    blank, shuffled, swapped = hide(record, 1), hide(record, 1, "shuffle"), hide(record, 1, "swap", RECORDS[0])
    for changed in (blank, shuffled, swapped):
        assert np.array_equal(np.asarray(changed.references[0].image), shown[0])
        assert not np.array_equal(np.asarray(changed.references[1].image), shown[1])
        assert changed.prompt().instruction == record.instruction and changed.references[1].marker == record.references[1].marker
    assert (np.asarray(blank.references[1].image) == 128).all()
    a, b = (np.sort(np.asarray(r.references[1].image).reshape(-1, 3), 0) for r in (shuffled, record))
    assert np.array_equal(a, b)  # the same pixels
    tiles = [np.asarray(r.references[1].image).reshape(4, 12, 4, 12, 3).swapaxes(1, 2).reshape(16, -1) for r in (shuffled, record)]
    moved = (tiles[0] != tiles[1]).any(1)
    assert moved.sum() >= 4  # tiles of the ground are alike
    assert swapped.references[1].image is RECORDS[0].references[0].image
    with pytest.raises(ValueError, match="another record"):
        hide(record, 0, "swap")


def test_one_word_changes_and_markers_stay() -> None:
    record = replace(RECORDS[0], instruction="Draw [ref#1] toy on a Red ground, left of a star", references=RECORDS[0].references[:1])
    changed = reword(record)
    assert changed is not None and changed.instruction == "Draw [ref#1] toy on a green ground, left of a star"
    assert reword(replace(record, instruction="[ref#1] reading")) is None
    assert all((new := reword(r)) is not None and new.instruction != r.instruction for r in RECORDS)


def test_movement_is_told_inside_and_outside_of_a_region() -> None:
    before, masks = torch.zeros(3, 3, 8, 8), torch.zeros(3, 1, 8, 8)
    masks[:2, :, :4, :4] = 1
    after = before.clone()
    after[0, :, :4, :4] = 1.0  # half of the range of [-1, 1]
    after[1, 0, 4:, :] = -0.6
    inside, outside = (Movement(w).score(before, after, masks) for w in ("inside", "outside"))  # type: ignore[arg-type]
    assert inside[:2].tolist() == pytest.approx([0.5, 0]) and outside[:2].tolist() == pytest.approx([0, 0.1 * 32 / 48])
    assert bool(inside[2].isnan()) and bool(outside[2].isnan())
    assert Movement().score(before, after).tolist() == pytest.approx([0.5 / 4, 0.1 / 2, 0])
    with pytest.raises(ValueError, match="needs its masks"):
        Movement("inside").update(before, after)


@pytest.mark.parametrize("patches", ["pixels", "clip"])
def test_a_paste_of_the_reference_scores_and_the_target_does_not(patches: str) -> None:
    metric = CopyPaste("toybox/clip" if patches == "clip" else None)
    targets = stack([r.target for r in RECORDS])
    assert metric.score(targets, RECORDS).tolist() == pytest.approx([0.0] * 8, abs=1e-6)
    pasted = metric.score(stack([r.references[0].image for r in RECORDS]), RECORDS)
    others = metric.score(stack([r.target for r in (*RECORDS[1:], RECORDS[0])]), RECORDS)
    assert float(pasted.mean()) > 0.03 and bool((pasted - others > 0.02).all())


def test_the_nearest_patch_of_pixels_is_that_of_a_plain_search() -> None:
    record = RECORDS[0]
    drawn, reference = stack([RECORDS[1].target])[0], stack([record.references[0].image])[0]
    alone = replace(record, references=record.references[:1], instruction="[ref#1] toy")

    def nearest(picture: Tensor) -> float:
        best = []
        for y in range(0, 64, 8):
            for x in range(0, 64, 8):
                patch = reference[:, y : y + 8, x : x + 8]
                spots = [(v, u) for v in range(0, 57, 4) for u in range(0, 57, 4)]
                best.append(max(1 - float((patch - picture[:, v : v + 8, u : u + 8]).abs().mean()) / 2 for v, u in spots))
        return float(np.mean(best))

    expected = nearest(drawn) - nearest(stack([record.target])[0])
    assert float(CopyPaste().score(drawn[None], [alone])) == pytest.approx(expected, abs=1e-5) and expected != 0


def test_words_alone_have_no_copy(tmp_path: Path) -> None:
    picture = PILImage.new("RGB", (64, 64), "red")
    styled = Record("in [ref#1] style", (Reference(1, picture, "style", "style"),), picture)
    assert bool(CopyPaste().score(torch.zeros(1, 3, 64, 64), [styled]).isnan().all())

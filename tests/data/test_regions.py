"""Where phrases lie in a target."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from lightning_mmgen.data.masks import regions
from lightning_mmgen.prompt import Box


def test_a_box_or_its_mask_covers_its_share_of_each_cell_of_the_square_in_the_middle() -> None:
    white = np.zeros((8, 16), np.uint8)
    white[2:4, 4:8] = 255
    boxes = [
        Box("dog", 3, 1, 7, 4),
        Box("dog", 11, 7, 16, 8),
        Box("cat", 0, 0, 16, 8, mask=Image.fromarray(white)),
        Box("bird", 0, 0, 4, 8),
    ]
    maps = regions(boxes, (16, 8), 4)
    fine = torch.zeros(8, 16)
    fine[1:4, 3:7] = fine[7:8, 11:16] = 1
    expected = fine[:, 4:12].view(4, 2, 4, 2).mean((1, 3))
    assert set(maps) == {"dog", "cat"}  # the bird lies outside
    torch.testing.assert_close(maps["dog"], expected)
    torch.testing.assert_close(maps["cat"], torch.from_numpy(white / 255.0)[:, 4:12].view(4, 2, 4, 2).mean((1, 3)).float())

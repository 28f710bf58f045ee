"""How much of a word's attention target lies on the object that the word names: full mode, fast mode, and every choice of layers.

    OMP_NUM_THREADS=2 python benchmarks/attention_targets.py [--pictures 32] [--steps 10] [--layers ''] [--only-fast]

On captions of the toybox, whose renderer knows where each toy is. The mass of a word is the share of its map, from 0 to 1, that lies inside
its toy's true mask; the lift is the mass over the share of the picture that the mask covers: 1 for a map that says nothing. Prints a line
a choice of layers and mode, with the mass and lift of the words that name shapes, colours and textures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_mmgen.build.attention import Mode, Row, Targets, look
from lightning_mmgen.build.generators import Generator, open_generator
from lightning_mmgen.data.attention import Word
from lightning_mmgen.data.images import pixels
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.models.attention import layers_of
from lightning_mmgen.toybox.render import draw
from lightning_mmgen.toybox.world import NAMES, Scene


def named(scene: Scene, caption: str, words: list[Word]) -> Iterator[tuple[int, str, int]]:
    """Words that name something of a toy: place of the word, what it names, place of the toy."""
    at = 0
    for toy, placed in enumerate(scene.toys):
        start = caption.index(placed.toy.words(), at)
        at = start + len(placed.toy.words())
        for k, word in enumerate(words):
            kind = next((kind for kind, values in NAMES.items() if word.text in values), None)
            if kind and start <= word.start < at:
                yield k, kind, toy


def masses(scene: Scene, row: Row, maps: Tensor) -> Iterator[tuple[str, float, float]]:
    """What each naming word names, the share of its map inside the toy's mask, and that over the mask's share of the picture."""
    size = maps.shape[-1]
    masks = interpolate(torch.stack([torch.from_numpy(mask) for mask in draw(scene)[1]])[None], (size, size), mode="area")[0]
    for k, kind, toy in named(scene, row.caption, [placed.word for placed in row.words]):
        mass = float((maps[k] * masks[toy]).sum() / maps[k].sum().clamp(min=1e-9))
        yield kind, mass, mass / float(masks[toy].mean())


def measure(generator: Generator, scenes: list[Scene], rows: list[Row], settings: Targets) -> Iterator[str]:
    """A line a mode."""
    found: dict[str, list[tuple[str, float, float]]] = {}
    for at in range(0, len(rows), settings.batch_size):
        batch = slice(at, at + settings.batch_size)
        for mode, maps in look(generator, rows[batch], settings, both=False).maps.items():
            for scene, row, one in zip(scenes[batch], rows[batch], maps, strict=True):
                found.setdefault(mode, []).extend(masses(scene, row, one))
    for mode, numbers in found.items():
        kinds = {kind: [(mass, lift) for name, mass, lift in numbers if name == kind] for kind in NAMES}
        means = [tuple(map(statistics.fmean, zip(*pairs, strict=True))) for pairs in kinds.values()]
        yield f"{mode:<5}" + "".join(f"{mass:>9.3f} {lift:>6.2f}x" for mass, lift in means)


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--pictures", type=int, default=32)
    args.add_argument("--steps", type=int, default=10)
    args.add_argument("--layers", default="", help="choices, parted by spaces; every layer alone by default")
    args.add_argument("--only-fast", action="store_true")
    given = args.parse_args()
    generator, source = open_generator("toybox"), ToyboxSource({"caption": 1.0}, length=given.pictures)
    records = list(source)
    scenes = [record.extra["truth"].scene for record in records]
    rows = [Row(r.id, "", pixels(r.target), r.caption or "", generator.words(r.caption or "")) for r in records if r.target is not None]
    print(f"{'layers':<55}{'mode':<5}" + "".join(f"{kind:>17}" for kind in NAMES))
    for layers in given.layers.split() or ["", *layers_of(generator.unet)]:
        mode: Mode = "fast" if given.only_fast or (layers and not given.layers) else "full"
        settings = Targets("toybox", "toybox", mode=mode, steps=given.steps, layers=layers, batch_size=16)
        for line in measure(generator, scenes, rows, settings):
            print(f"{layers or 'default':<55}{line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

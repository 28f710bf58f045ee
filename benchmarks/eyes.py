"""What single tokens of the toybox's VLM tell of the toys in a picture.

    python benchmarks/eyes.py [--vlm toybox/vlm] [--train 1500] [--count 300]

Least squares from one token at a time, with noise of standard deviation 1 on it (a token's own is 1), on toys alone (25 tokens a picture)
and in whole scenes (64, those inside a toy's box). Prints the mean squared error of each trait, from -1 to 1, where chance has 0.33, and
how often the best of a name's scores is right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightning_mmgen.batch import pack
from lightning_mmgen.data.images import pixels
from lightning_mmgen.models.idefics2 import Idefics2Encoder
from lightning_mmgen.toybox.pretrain_vlm import KINDS, UNSEEN, Shown, toys_alone, toys_in_scenes
from lightning_mmgen.toybox.tasks import TASKS
from lightning_mmgen.toybox.world import TRAITS

VIEWS: dict[str, tuple[str, int, Callable[..., Shown | None]]] = {
    "alone": ("measuring", 40, toys_alone),
    "in scenes": ("question", 64, toys_in_scenes),
}


@torch.no_grad()
def look(encoder: Idefics2Encoder, view: str, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy tokens [n, d] of so many pictures, and the names [n, kinds] and measures [n, 8] of what each shows."""
    task, side, find = VIEWS[view]
    found = []
    for at in range(0, count, 50):
        records = [TASKS[task](np.random.default_rng((seed, i)), False) for i in range(at, min(at + 50, count))]
        markers = [[ref.marker for ref in r.references] for r in records]
        pictures = pack([[pixels(ref.image, side) for ref in r.references] for r in records])
        shown = find(records, encoder.embed([r.prompt().instruction for r in records], markers, pictures))
        assert shown is not None
        found.append((shown.tokens, shown.names[shown.which], shown.measures[shown.which]))
    tokens, names, measures = map(torch.cat, zip(*found, strict=True))
    return with_one(tokens + torch.randn_like(tokens)), names, measures


def with_one(tokens: Tensor) -> Tensor:
    """For the constant."""
    return torch.cat([tokens, tokens.new_ones(len(tokens), 1)], 1).double()


def learn(tokens: Tensor, wanted: Tensor) -> Tensor:
    """Weights of least squares, with a trace of ridge."""
    power = tokens.T @ tokens + 0.01 * torch.eye(tokens.shape[1])
    return torch.linalg.solve(power, tokens.T @ wanted.double())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vlm", default="toybox/vlm")
    parser.add_argument("--train", type=int, default=1500, help="pictures to learn from")
    parser.add_argument("--count", type=int, default=300, help="pictures to tell")
    args = parser.parse_args()
    torch.manual_seed(0)
    encoder = Idefics2Encoder(args.vlm, image_tokens=25, norm=True)
    encoder.build()
    print(f"{'':<12}" + "".join(f"{name:>10}" for name in (*TRAITS, *KINDS)))
    for view in VIEWS:
        (x, names, measures), (y, other_names, other_measures) = (look(encoder, view, n, s) for n, s in ((args.train, 5), (args.count, 6)))
        cells = []
        for k in range(len(TRAITS)):
            has, own = measures[:, k].isfinite(), other_measures[:, k].isfinite()
            errors = y[own] @ learn(x[has], measures[has, k]) - other_measures[own, k]
            cells.append(f"{float(errors.square().mean()):.3f}")
        for k, kinds in enumerate(KINDS.values()):
            if (names[:, k] == UNSEEN).any():
                cells.append("-")
                continue
            scores = y @ learn(x, torch.nn.functional.one_hot(names[:, k], len(kinds)))
            cells.append(f"{float((scores.argmax(1) == other_names[:, k]).double().mean()):.3f}")
        print(f"{view:<12}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()

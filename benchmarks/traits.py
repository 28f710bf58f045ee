"""What a model has learned of references, attribute by attribute and trait by trait, without sampling.

    python benchmarks/traits.py --ckpt runs/instruct/version_0/checkpoints/last.ckpt [--count 48]

For one toy in a scene, its reference is drawn twice, with one attribute or trait changed between the two (a trait from a tenth to nine
tenths of its range). The scene's noised latents, half-way between the two targets, are the same. Printed is how far the estimate of z_0
moves along the true change of z_0: 0 is a reference that is ignored, 1 one that decides all. Less than 1 is right where the rest of the
toy cannot be known, and where the noised latents already tell (small timesteps).
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from lightning_mmgen.batch import Condition, pack
from lightning_mmgen.data.images import pixels
from lightning_mmgen.module import MultimodalDiffusion
from lightning_mmgen.tools.generate import load_module
from lightning_mmgen.toybox.render import portrait
from lightning_mmgen.toybox.tasks import picture
from lightning_mmgen.toybox.world import NAMES, TRAITS, Scene, place, random_toy

TIMESTEPS = (999, 900, 800, 600, 400, 200)


def changed(scene: Scene, **what: object) -> Scene:
    """The scene with another value for one attribute or trait of its toy."""
    placed = scene.toys[0]
    return replace(scene, toys=(replace(placed, toy=replace(placed.toy, **what)),))  # type: ignore[arg-type]


def pair(scene: Scene, name: str, i: int) -> tuple[Scene, Scene] | None:
    """The scene twice, with two values for one attribute or trait; none if its toy does not show it."""
    toy = scene.toys[0].toy
    if name in NAMES:
        kinds = NAMES[name]
        other = kinds[(kinds.index(getattr(toy, name)) + 1 + i % (len(kinds) - 1)) % len(kinds)]
        return scene, changed(scene, **{name: other})
    if name not in toy.traits():
        return None
    low, high = TRAITS[name]
    return changed(scene, **{name: 0.9 * low + 0.1 * high}), changed(scene, **{name: 0.1 * low + 0.9 * high})


@torch.no_grad()
def shares(model: MultimodalDiffusion, pairs: list[tuple[Scene, Scene]]) -> list[float]:
    """The mean share of the true change that the estimate of z_0 makes, at each of ``TIMESTEPS``."""
    sides = [list(scenes) for scenes in zip(*pairs, strict=True)]
    first, second = (model.codec.encode(torch.stack([pixels(picture(s)) for s in scenes])) for scenes in sides)
    conditions = [shown(model, scenes) for scenes in sides]
    middle, change = (first + second) / 2, second - first
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    out = []
    for t in TIMESTEPS:
        timesteps = torch.full((len(pairs),), t)
        z_t = model.diffusion.add_noise(middle, noise, timesteps)
        a, b = (model.diffusion.estimate_z0(model(z_t, timesteps, c, (64, 64)), z_t, timesteps) for c in conditions)
        out.append(float(((b - a) * change).sum() / change.square().sum()))
    return out


def shown(model: MultimodalDiffusion, scenes: list[Scene]) -> Condition:
    """The scenes as prompts that show their toy and tell the rest."""
    texts = [s.caption(["[ref#1] toy"], style=False) for s in scenes]
    portraits = [Image.fromarray(portrait(s.toys[0].toy, "grey")) for s in scenes]
    references = pack([[pixels(p, model.encoder.reference_size)] for p in portraits])
    return model.adapter(model.encoder(texts, [[1]] * len(texts), references))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--count", type=int, default=48)
    args = parser.parse_args()
    model, rng = load_module(args.ckpt), np.random.default_rng(5)
    scenes = [place(rng, (random_toy(rng),), style="flat") for _ in range(args.count)]
    print(f"{'t':<10}" + "".join(f"{t:>7}" for t in TIMESTEPS))
    for name in (*NAMES, *TRAITS):
        pairs = [p for i, s in enumerate(scenes) if (p := pair(s, name, i))]
        print(f"{name:<10}" + "".join(f"{share:7.2f}" for share in shares(model, pairs)), flush=True)


if __name__ == "__main__":
    main()

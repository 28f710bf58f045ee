"""What a model has learned of references, attribute by attribute and trait by trait.

    python benchmarks/traits.py --ckpt runs/instruct/version_0/checkpoints/last.ckpt [--count 48] [--drawn 128]
    python benchmarks/traits.py --words  # of the shipped base, by captions that measure

First without sampling. For one toy in a scene, its reference is drawn twice, with one attribute or trait changed between the two (a trait
from a tenth to nine tenths of its range). The scene's noised latents, half-way between the two targets, are the same. Printed is how far
the estimate of z_0 moves along the true change of z_0: 0 is a reference that is ignored, 1 one that decides all. Less than 1 is right where
the rest of the toy cannot be known, and where the noised latents already tell (small timesteps).

Then as the oracle reads them in drawn pictures of held-out instructions, where it finds the toy (and its texture, for pitch and phase): how
far each trait is off, over its range, and how it correlates with the reference's. A third is chance, a quarter the middle of the range. The
last line has the object consistency that there would be if the traits that correlate were read without error, and every toy found.

With ``--words`` the first table alone, of the base before any reference: its captions name the toy and measure it (``measured``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from claims.jobs import shipped
from lightning_mmgen.callbacks import sample
from PIL import Image

from lightning_mmgen.batch import Condition, pack
from lightning_mmgen.data.images import pixels
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.module import MultimodalDiffusion
from lightning_mmgen.pipeline import MultimodalPipeline, to_pil
from lightning_mmgen.tools.generate import load_module
from lightning_mmgen.toybox.oracle import match, read_all
from lightning_mmgen.toybox.render import portrait
from lightning_mmgen.toybox.truth import picture
from lightning_mmgen.toybox.world import NAMES, TRAITS, Scene, Toy, place, random_toy, trait_error

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
def shares(
    model: MultimodalDiffusion, pairs: list[tuple[Scene, Scene]], asked: Callable[[MultimodalDiffusion, list[Scene]], Condition]
) -> list[float]:
    """The mean share of the true change that the estimate of z_0 makes, at each of ``TIMESTEPS``, as the scenes are ``asked`` for."""
    sides = [list(scenes) for scenes in zip(*pairs, strict=True)]
    first, second = (model.codec.encode(torch.stack([pixels(picture(s)) for s in scenes])) for scenes in sides)
    conditions = [asked(model, scenes) for scenes in sides]
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


def told(model: MultimodalDiffusion, scenes: list[Scene]) -> Condition:
    """The scenes as captions that measure their toy."""
    texts = [s.caption([s.toys[0].toy.words(list(s.toys[0].toy.measures()))]) for s in scenes]
    return model.adapter(model.encoder(texts, [[]] * len(texts), []))


def drawn(model: MultimodalDiffusion, count: int) -> list[tuple[Toy, Toy]]:
    """The toys that references show, and those that the oracle sees in their place, of the same shape and colour."""
    source = ToyboxSource({"subject": 1.0}, length=256, held_out=True)
    wanted = [source.record(i) for i in range(count)]
    images = to_pil(sample(MultimodalPipeline.of(model), wanted, seed=1))
    pairs = []
    for seen, record in zip(read_all(np.stack([np.asarray(image) for image in images])), wanted, strict=True):
        truth = record.extra["truth"]
        found = zip((p.toy for p in truth.scene.toys), match(seen, truth), strict=True)
        pairs += [(toy, s.toy) for toy, s in found if s and (s.toy.shape, s.toy.colour) == (toy.shape, toy.colour)]
    return pairs


def read_off(pairs: list[tuple[Toy, Toy]]) -> None:
    """Print the second table."""
    unread: dict[str, float] = {}
    print(f"\n{'drawn':<10}{'toys':>7}{'error':>7}{'corr.':>7}")
    for name in TRAITS:
        shown = [(a, b) for a, b in pairs if name not in ("pitch", "phase") or a.texture == b.texture != "solid"]
        alike = [(getattr(a, name), getattr(b, name)) for a, b in shown]
        error, corr = np.mean([trait_error(name, *pair) for pair in alike]), np.corrcoef(np.array(alike).T)[0, 1]
        unread |= {} if corr > 0.2 else {name: float(error)}
        print(f"{name:<10}{len(alike):>7}{error:>7.2f}{corr:>7.2f}")
    best = np.mean([1 - sum(unread.get(n, 0.0) for n in a.traits()) / len(a.traits()) for a, _ in pairs])
    print(f"consistency without any error but in {', '.join(unread) or 'none'}: {best:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt")
    what.add_argument("--words", action="store_true", help="the shipped base, by captions that measure")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--drawn", type=int, default=128, help="held-out pictures")
    args = parser.parse_args()
    model, rng = shipped() if args.words else load_module(args.ckpt), np.random.default_rng(5)
    scenes = [place(rng, (random_toy(rng),), style="flat") for _ in range(args.count)]
    print(f"{'t':<10}" + "".join(f"{t:>7}" for t in TIMESTEPS))
    for name in (*NAMES, *TRAITS):
        pairs = [p for i, s in enumerate(scenes) if (p := pair(s, name, i))]
        print(f"{name:<10}" + "".join(f"{share:7.2f}" for share in shares(model, pairs, told if args.words else shown)), flush=True)
    if not args.words:
        read_off(drawn(model, args.drawn))


if __name__ == "__main__":
    main()

"""The toybox world: what a scene is, how one is drawn at random, and how it is put into words.

A scene holds one or two toys on a plain background, in a rendering style. Every toy has *named* attributes (shape, colour,
texture, size), which captions use, and *unnamed* continuous traits (exact hue, pitch and phase of the texture, width of the
outline, proportions), which no caption names but those that measure (``measured``, for the base): in an instruction only a picture
tells them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {"red": 0.0, "yellow": 60.0, "green": 120.0, "cyan": 180.0, "blue": 240.0, "pink": 300.0}
TEXTURES = ("solid", "striped", "banded", "checkered")  # stripes stand, bands lie
SIZES = {"small": 19.0, "large": 25.5}  # side in pixels of a 64 x 64 picture
BACKGROUNDS = {
    "white": (0.97, 0.97, 0.97),
    "grey": (0.62, 0.62, 0.62),
    "blue": (0.66, 0.78, 0.98),
    "green": (0.68, 0.93, 0.70),
    "yellow": (0.97, 0.92, 0.62),
    "pink": (0.98, 0.74, 0.86),
}
NAMES = {"shape": SHAPES, "colour": tuple(COLOURS), "texture": TEXTURES}  # what a toy's words say, and what they may be
STYLES = ("flat", "shaded", "spotlight", "pastel")
PLACES = {"left of": ((17, 32), (47, 32)), "above": ((32, 17), (32, 47))}  # (x, y) of the first and the second toy
SPOTS = {"in the centre": (32, 32), "on the left": (19, 32), "on the right": (45, 32), "at the top": (32, 19), "at the bottom": (32, 45)}

# The unnamed traits and their ranges. Phases stay near zero, so that a texture's word alone says roughly where its tones lie.
TRAITS = {"hue": (-20.0, 20.0), "pitch": (1.2, 2.2), "phase": (-0.15, 0.15), "outline": (0.0, 0.11), "aspect": (-0.25, 0.25)}


@dataclass(frozen=True)
class Toy:
    """One object. ``hue`` is an offset in degrees from the colour's centre; ``pitch`` counts texture cycles across the toy,
    ``phase`` shifts them by a part of one cycle; ``outline`` is the rim's width over the toy's side; ``aspect`` is
    log(height / width)."""

    shape: str
    colour: str
    texture: str
    hue: float
    pitch: float
    phase: float
    outline: float
    aspect: float

    def words(self, measures: Sequence[str] = ()) -> str:
        """The toy's named attributes, and these of its measures: ``"red striped star"``, ``"red striped star hue 3 aspect 7"``."""
        marks = self.measures() if measures else {}
        return " ".join([self.colour, self.texture, self.shape, *(f"{name} {marks[name]}" for name in measures)])

    def traits(self) -> dict[str, float]:
        """The unnamed traits that show: a solid toy has neither pitch nor phase."""
        names = [n for n in TRAITS if self.texture != "solid" or n not in ("pitch", "phase")]
        return {name: getattr(self, name) for name in names}

    def measures(self) -> dict[str, int]:
        """The traits that show, on a scale of 0 to 9 over their ranges."""
        return {n: min(int(10 * (value - TRAITS[n][0]) / (TRAITS[n][1] - TRAITS[n][0])), 9) for n, value in self.traits().items()}

    def mirrored(self) -> Toy:
        """Its twin: every trait as far from the other end of its range."""
        return replace(self, **{name: low + high - getattr(self, name) for name, (low, high) in TRAITS.items()})


@dataclass(frozen=True)
class Placed:
    """A toy in a scene: its size word and the centre (x, y) in pixels of a 64 x 64 picture."""

    toy: Toy
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """One or two placed toys, a background's name, a style's name, and the words that say where the toys are."""

    toys: tuple[Placed, ...]
    background: str
    style: str
    place: str

    def caption(self, names: list[str] | None = None, *, sizes: bool = True, background: bool = True, style: bool = True) -> str:
        """Every condition in words, or those that are not switched off; ``names`` replaces the toys' own words (``"[ref#1] toy"``, say)."""
        names = names or [p.toy.words() for p in self.toys]
        toys = [f"a {p.size} {n}" if sizes else f"a {n}" for p, n in zip(self.toys, names, strict=True)]
        where = f"{toys[0]} {self.place} {toys[1]}" if len(toys) == 2 else f"{toys[0]} {self.place}"
        return where + (f" on a {self.background} background" if background else "") + (f", {self.style} style" if style else "")


def trait_error(name: str, a: float, b: float) -> float:
    """Distance of two values of a trait over the trait's range, in [0, 1]."""
    low, high = TRAITS[name]
    return min(abs(a - b) / (high - low), 1.0)


def held_out(toys: tuple[Toy, ...]) -> bool:
    """Whether this combination of named attributes is kept for evaluation: one in ten, by a hash that no seed changes."""
    key = "|".join(sorted(t.words() for t in toys))
    return hashlib.sha256(key.encode()).digest()[0] % 10 == 0


def random_toy(rng: np.random.Generator, avoid: tuple[str, ...] = ()) -> Toy:
    """A toy with uniformly drawn attributes and traits, its colour not among ``avoid``."""
    colour = str(rng.choice([c for c in COLOURS if c not in avoid]))
    traits = {name: float(rng.uniform(*bounds)) for name, bounds in TRAITS.items()}
    return Toy(str(rng.choice(SHAPES)), colour, str(rng.choice(TEXTURES)), **traits)


def place(rng: np.random.Generator, toys: tuple[Toy, ...], background: str | None = None, style: str | None = None) -> Scene:
    """Put toys into a scene: size, place, background and style drawn at random, a jitter of 1 px on every centre."""
    words = PLACES if len(toys) == 2 else SPOTS
    where = str(rng.choice(list(words)))
    centres = PLACES[where] if len(toys) == 2 else (SPOTS[where],)
    free = [b for b in BACKGROUNDS if b not in {t.colour for t in toys}]
    background = background or str(rng.choice(free))
    placed = tuple(
        Placed(t, str(rng.choice(list(SIZES))), x + rng.uniform(-1, 1), y + rng.uniform(-1, 1))
        for t, (x, y) in zip(toys, centres, strict=True)
    )
    return Scene(placed, background, style or str(rng.choice(STYLES)), where)


def random_scene(rng: np.random.Generator, *, held: bool = False, toys: int | None = None) -> Scene:
    """A scene whose combination of toys is held out (``held``) or free for training; one toy in three scenes, else two."""
    count = toys or int(rng.choice([1, 2, 2]))
    while True:
        first = random_toy(rng)
        chosen = (first,) if count == 1 else (first, random_toy(rng, avoid=(first.colour,)))
        if held_out(chosen) == held:
            return place(rng, chosen)


def other_view(rng: np.random.Generator, toy: Toy) -> Scene:
    """The same toy alone, elsewhere: another background, in the centre, flat. What a reference photograph of it would show."""
    scene = place(rng, (toy,), style="flat")
    return replace(scene, toys=(replace(scene.toys[0], x=32.0, y=32.0, size="large"),), place="in the centre")

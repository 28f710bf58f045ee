"""What the instruction of a toybox record asks for, and where its scene shows what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL.Image import Image

from ..prompt import Box
from .render import SIDE, draw
from .world import SIZES, STYLES, Scene


@dataclass(frozen=True)
class Truth:
    """What the instruction of a record asks for.

    Attributes:
        scene: the target scene.
        shown: for toys that a reference or source shows, index of the toy -> marker.
        sizes, style, place: whether the instruction states the toys' sizes, the picture's style, and where the toys are.
        edited: the condition that an edit is to bring about (``"colour 1"``, say), by the oracle's name.
    """

    scene: Scene
    shown: tuple[tuple[int, int], ...] = ()
    sizes: bool = False
    style: bool = False
    place: bool = True
    edited: str | None = None

    def description(self) -> str:
        """All of the scene in words, with the measures of the toys that a picture shows; more than the instruction may say."""
        shown = {toy for toy, _ in self.shown}
        toys = [placed.toy for placed in self.scene.toys]
        return self.scene.caption([toy.words(tuple(toy.measures()) if k in shown else ()) for k, toy in enumerate(toys)])

    def foil(self, pictured: tuple[str, ...] = ()) -> str | None:
        """The description of a scene that is unlike this one in what only pictures show: the other ends of the scales of the toys shown,
        and of what else is ``pictured`` the toys' other ``sizes`` and the next ``style``. None where pictures show nothing of this."""
        if not (self.shown or pictured):
            return None
        sizes = dict(zip(SIZES, reversed(SIZES) if "sizes" in pictured else SIZES, strict=True))
        toys = tuple(replace(p, toy=p.toy.mirrored(), size=sizes[p.size]) for p in self.scene.toys)
        style = STYLES[(STYLES.index(self.scene.style) + ("style" in pictured)) % len(STYLES)]
        return replace(self, scene=replace(self.scene, toys=toys, style=style)).description()


def picture(scene: Scene, side: int = SIDE) -> Image:
    """The scene as an upright RGB picture."""
    return PILImage.fromarray(draw(scene, side)[0])


def boxes(scene: Scene, masks: list[Any] | None = None) -> tuple[Box, ...]:
    """Where each toy lies, in pixels of the 64 x 64 picture; ``masks`` are what :func:`draw` gave for it, if it was drawn already."""
    out = []
    for placed, mask in zip(scene.toys, masks or draw(scene)[1], strict=True):
        xs, ys = np.flatnonzero((mask > 0.5).any(0)), np.flatnonzero((mask > 0.5).any(1))
        out.append(Box(placed.toy.words(), float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)))
    return tuple(out)

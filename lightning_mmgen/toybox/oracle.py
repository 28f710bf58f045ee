"""The oracle: reads a toybox picture back, by analysis and synthesis, and scores it against what its instruction asked for.

It is plain arithmetic on pixels with the renderer's own shapes: nothing is learned, and it never trains or selects a model.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .render import DARK_TONE, RIM, SIDE, Array, light, second_tone, signed_distance, stylise
from .tasks import Truth
from .world import BACKGROUNDS, COLOURS, NAMES, SHAPES, SIZES, SPOTS, STYLES, TEXTURES, TRAITS, Toy, trait_error

VALUE, SATURATION = 0.95, 0.85  # of a toy's first tone
SMALLEST = 40  # pixels; less is noise, not a toy


@dataclass(frozen=True)
class Seen:
    """A toy as read: its attributes and traits, size word, centre and half-extents in pixels."""

    toy: Toy
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """What the oracle sees in a picture."""

    background: str
    style: str
    toys: tuple[Seen, ...]


@cache
def _grounds() -> dict[tuple[str, str], Array]:
    plain = {name: np.broadcast_to(np.array(rgb, np.float32), (SIDE, SIDE, 3)) for name, rgb in BACKGROUNDS.items()}
    return {(style, name): stylise(picture, style) for style in STYLES for name, picture in plain.items()}


def read(picture: NDArray[np.uint8]) -> Reading:
    """Read a uint8 picture [64, 64, 3]."""
    p = picture.astype(np.float32) / 255
    pale = np.percentile(p.min(-1), 1.5) > 0.36  # a toy's weakest channel is 0.14, in the pastel style 0.53
    errors = {key: float(np.median(np.abs(p - ground).sum(-1))) for key, ground in _grounds().items() if (key[0] == "pastel") == pale}
    style, background = min(errors, key=lambda k: errors[k])
    flat = (p - 0.45) / 0.55 if style == "pastel" else p / light(style, SIDE)
    away = np.abs(flat - np.array(BACKGROUNDS[background], np.float32)).max(-1)
    labels, count = ndimage.label(away > 0.22)
    sizes = ndimage.sum_labels(np.ones_like(labels), labels, range(1, count + 1))
    largest = [int(i) + 1 for i in np.argsort(sizes)[::-1][:3] if sizes[i] >= SMALLEST]
    return Reading(background, style, tuple(_toy(flat, away, labels == i, max(BACKGROUNDS[background])) for i in largest))


def _toy(flat: Array, away: Array, mask: NDArray[np.bool_], ground: float) -> Seen:
    near = ndimage.binary_dilation(mask)
    soft = np.where(near, np.clip(away / 0.5, 0, 1), 0).astype(np.float32)
    ys, xs = np.nonzero(mask)
    start = ((xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2, (np.ptp(xs) + 1) / 2, (np.ptp(ys) + 1) / 2)
    box = slice(max(ys.min() - 2, 0), ys.max() + 3), slice(max(xs.min() - 2, 0), xs.max() + 3)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)[(slice(None), *box)]
    fits = {shape: _fit(shape, soft[box], x, y, start, (0.5,)) for shape in SHAPES}
    shape = min(fits, key=lambda s: fits[s][0])
    _, (cx, cy, w, h) = _fit(shape, soft[box], x, y, fits[shape][1], (0.5, 0.25, 0.12))
    side = 2 * float(np.sqrt(w * h))
    d = signed_distance(shape, x - cx, y - cy, w, h)
    pixels = flat[box]
    value = pixels.max(-1)
    outline = _outline(d, value, side, ground)
    margins = (d < -outline * side - m for m in (1.0, 0.7, 0.4))  # clear of the rim, where the toy is wide enough
    inner = next((i for i in margins if i.sum() >= 16), d < -outline * side)
    inner = inner if inner.any() else mask[box]  # a blob that is all rim
    hue = _hue(pixels[inner])
    colour = min(COLOURS, key=lambda c: _turn(hue, COLOURS[c]))
    texture, pitch, phase = _texture(value[inner], ((x - cx) / w)[inner], ((y - cy) / h)[inner], min(w, h))
    offset = (hue - COLOURS[colour] + 180) % 360 - 180
    toy = Toy(shape, colour, texture, float(offset), pitch, phase, outline, float(np.log(h / w)))
    size = min(SIZES, key=lambda s: abs(SIZES[s] - side))
    return Seen(toy, size, float(cx) + 0.5, float(cy) + 0.5)


def _fit(
    shape: str, soft: Array, x: Array, y: Array, start: tuple[float, ...], steps: tuple[float, ...]
) -> tuple[float, tuple[float, ...]]:
    """Coordinate descent on centre and half-extents: the squared error of the silhouette, and where it is least."""

    def error(at: tuple[float, ...]) -> float:
        inside = np.clip(0.5 - signed_distance(shape, x - at[0], y - at[1], at[2], at[3]), 0, 1)
        return float(((inside - soft) ** 2).sum())

    best, at = error(start), tuple(float(v) for v in start)
    for step in steps:
        for _ in range(3):
            before = best
            for i in range(4):
                for move in (-step, step):
                    trial = (*at[:i], at[i] + move, *at[i + 1 :])
                    if trial[2] > 2 and trial[3] > 2 and (e := error(trial)) < best:
                        best, at = e, trial
            if best == before:
                break
    return best, at


def _outline(d: Array, value: Array, side: float, ground: float) -> float:
    """The rim's width over the side: the one at which the renderer's rim is as dark, in sum, as what is seen near the edge."""
    near = (d < 0.5) & (d > -0.16 * side - 1)

    def dark(v: Array) -> float:
        return float(np.clip((0.36 - v[near]) / (0.36 - RIM), 0, 1).sum())

    low, high = TRAITS["outline"]
    widths, inside = np.linspace(low, high * 1.2, 25), np.clip(0.5 - d, 0, 1)
    fills = [np.clip(0.5 - d - o * side, 0, 1) for o in widths]
    expected = [dark(VALUE * f + RIM * (inside - f) + ground * (1 - inside)) for f in fills]
    return float(np.clip(np.interp(dark(value), expected, widths), low, high))


def _hue(pixels: Array) -> float:
    """Median hue in degrees of the saturated pixels [n, 3]."""
    chroma = pixels.max(-1) - pixels.min(-1)
    chosen = np.clip(pixels[chroma >= np.percentile(chroma, 60)], 0, 1) if len(pixels) else np.zeros((1, 3))
    hues = np.array([colorsys.rgb_to_hsv(*map(float, c))[0] for c in chosen]) * 2 * np.pi
    mean = np.arctan2(np.sin(hues).mean(), np.cos(hues).mean())
    return float(np.degrees(mean + np.median((hues - mean + np.pi) % (2 * np.pi) - np.pi)) % 360)


def _turn(a: float, b: float) -> float:
    return abs((a - b + 180) % 360 - 180)


def _texture(value: Array, u: Array, v: Array, extent: float) -> tuple[str, float, float]:
    """The texture whose best pitch and phase explain the dark tone [n], by search on a grid, then a finer one."""
    top = float(np.percentile(value, 90))
    tone = np.clip((top - value) / (top * (1 - DARK_TONE) + 1e-6), -0.2, 1.2)
    results = {"solid": (float((tone**2).mean()) - 0.05, 2.0, 0.0)}
    low, high = TRAITS["pitch"]
    for texture in TEXTURES[1:]:
        pitches, phases = np.meshgrid(np.linspace(low, high, 15), np.arange(16) / 16 - 0.5, indexing="ij")
        _, pitch, phase = _search(texture, tone, u, v, pitches, phases, extent)
        pitches, phases = np.meshgrid(
            np.clip(pitch + np.linspace(-0.1, 0.1, 9), low, high), phase + np.linspace(-0.06, 0.06, 9), indexing="ij"
        )
        results[texture] = _search(texture, tone, u, v, pitches, phases, extent)
    texture = min(results, key=lambda t: results[t][0])
    return texture, results[texture][1], (results[texture][2] + 0.5) % 1.0 - 0.5


def _search(texture: str, tone: Array, u: Array, v: Array, pitches: Array, phases: Array, extent: float) -> tuple[float, float, float]:
    pitch, phase = pitches.reshape(-1, 1).astype(np.float32), phases.reshape(-1, 1).astype(np.float32)
    model = second_tone(texture, u[None], v[None], pitch, phase, pitch / (2 * extent))  # [grid, n]
    model, tone = model - model.mean(1, keepdims=True), tone - tone.mean()
    strength = np.clip((model * tone).sum(1) / ((model**2).sum(1) + 1e-6), 0.35, 1.2)[:, None]  # a blurred texture is weaker
    errors = ((strength * model - tone) ** 2).mean(1)
    best = int(errors.argmin())
    return float(errors[best]), float(pitch[best, 0]), float(phase[best, 0])


# -- scores ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Conditions of an instruction and whether each holds; for each toy that a reference shows, its consistency; and, for an edit, whether
    what it asks for came about."""

    conditions: dict[str, bool]
    consistency: tuple[float, ...]
    success: bool | None = None

    @property
    def following(self) -> float:
        """The share of the conditions that hold."""
        return sum(self.conditions.values()) / len(self.conditions)

    @property
    def strict(self) -> bool:
        """Whether all conditions hold."""
        return all(self.conditions.values())


def score(picture: NDArray[np.uint8], truth: Truth) -> Score:
    """Instruction following and object consistency of a picture [64, 64, 3].

    Following: shape, colour and texture of every toy, where they are (or else how many), the background, and sizes and style where
    stated. Consistency of a toy that a reference shows: 1 - the mean error of its unnamed traits, each over its range; 0 where no toy of
    its shape and colour is found.
    """
    return judge(read(picture), truth)


def judge(reading: Reading, truth: Truth) -> Score:
    """:func:`score` of what was read in a picture."""
    scene = truth.scene
    matched = _match(reading, truth)
    conditions: dict[str, bool] = {"background": reading.background == scene.background}
    if truth.style:
        conditions["style"] = reading.style == scene.style
    for k, (placed, seen) in enumerate(zip(scene.toys, matched, strict=True)):
        for name in NAMES:
            conditions[f"{name} {k + 1}"] = seen is not None and getattr(seen.toy, name) == getattr(placed.toy, name)
        if truth.sizes:
            conditions[f"size {k + 1}"] = seen is not None and seen.size == placed.size
    counted = len(reading.toys) == len(scene.toys)
    conditions["place" if truth.place else "count"] = counted and (not truth.place or _placed(matched, scene.place))
    shown = tuple(consistency(scene.toys[k].toy, matched[k]) for k, _ in truth.shown)
    return Score(conditions, shown, conditions[truth.edited] if truth.edited else None)


def consistency(toy: Toy, seen: Seen | None) -> float:
    """1 - the mean error of the toy's unnamed traits; 0 if no toy of its shape and colour is seen."""
    if seen is None or (seen.toy.shape, seen.toy.colour) != (toy.shape, toy.colour):
        return 0.0
    errors = []
    for name, value in toy.traits().items():
        read_it = name not in ("pitch", "phase") or seen.toy.texture == toy.texture
        errors.append(trait_error(name, value, getattr(seen.toy, name)) if read_it else 1.0)
    return 1 - float(np.mean(errors))


def _match(reading: Reading, truth: Truth) -> list[Seen | None]:
    """For each toy asked for, the seen toy that it is compared with: the assignment with the most attributes right, then the nearest."""
    wanted = truth.scene.toys
    seen: list[Seen | None] = [*reading.toys, *[None] * len(wanted)]

    def worth(pick: tuple[Seen | None, ...]) -> tuple[int, float]:
        right = sum(getattr(s.toy, n) == getattr(p.toy, n) for p, s in zip(wanted, pick, strict=True) if s for n in NAMES)
        far = sum(np.hypot(s.x - p.x, s.y - p.y) for p, s in zip(wanted, pick, strict=True) if s)
        return sum(s is not None for s in pick) * 100 + right, -float(far)

    return list(max(permutations(seen, len(wanted)), key=worth))  # type: ignore[arg-type]


def _placed(seen: list[Seen | None], place: str) -> bool:
    if any(s is None for s in seen):
        return False
    if len(seen) == 1:
        only = seen[0]
        assert only is not None
        return min(SPOTS, key=lambda s: np.hypot(only.x - SPOTS[s][0], only.y - SPOTS[s][1])) == place
    a, b = seen
    assert a is not None and b is not None
    dx, dy = b.x - a.x, b.y - a.y
    return dx > abs(dy) if place == "left of" else dy > abs(dx)

"""The oracle: reads a toybox picture back, by analysis and synthesis, and scores it against what its instruction asked for.

It is plain arithmetic on pixels with the renderer's own shapes: nothing is learned, and it never trains or selects a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .render import DARK_TONE, RIM, SIDE, Array, light, second_tone, signed_distance, stylise
from .truth import Truth
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


class _Blob(NamedTuple):
    """A part of a picture [h, w] that is not its background: pixels without the style's light, how far each is toy, the blob itself, the
    coordinates of columns and rows; a first guess at centre and half-extents, and the brightest channel of the background."""

    pixels: Array
    soft: Array
    mask: NDArray[np.bool_]
    x: Array
    y: Array
    start: tuple[float, ...]
    ground: float


@cache
def _grounds() -> tuple[list[tuple[str, str]], Array]:
    """Style and background of every empty picture, and its channels [n, 3, 64 * 64]."""
    plain = {name: np.broadcast_to(np.array(rgb, np.float32), (SIDE, SIDE, 3)) for name, rgb in BACKGROUNDS.items()}
    pictures = {(style, name): stylise(picture, style) for style in STYLES for name, picture in plain.items()}
    return [*pictures], np.stack([p.reshape(-1, 3).T for p in pictures.values()])


def read(picture: NDArray[np.uint8]) -> Reading:
    """Read a uint8 picture [64, 64, 3]."""
    return read_all(picture[None])[0]


def read_all(pictures: NDArray[np.uint8]) -> list[Reading]:
    """Read uint8 pictures [n, 64, 64, 3]; their toys are fitted side by side, which is faster than one by one."""
    scaled = [p.astype(np.float32) / 255 for p in pictures]
    grounds = [_ground(p) for p in scaled]
    blobs = [_blobs(p, *ground) for p, ground in zip(scaled, grounds, strict=True)]
    fits = iter(_silhouettes([blob for some in blobs for blob in some]))
    return [
        Reading(background, style, tuple(_toy(blob, *next(fits)) for blob in some))
        for (style, background), some in zip(grounds, blobs, strict=True)
    ]


def _ground(p: Array) -> tuple[str, str]:
    """Style and background."""
    channels = p.reshape(-1, 3).T
    pale = np.percentile(channels.min(0), 1.5) > 0.36  # a toy's weakest channel is 0.14, in the pastel style 0.53
    names, grounds = _grounds()
    known = [i for i, (style, _) in enumerate(names) if (style == "pastel") == pale]
    errors = sum(np.abs(channel - grounds[known, i]) for i, channel in enumerate(channels))  # [grounds, pixels]
    middle = channels.shape[1] // 2
    medians = np.partition(errors, (middle - 1, middle), axis=1)[:, middle - 1 : middle + 1].mean(1)
    return names[known[int(medians.argmin())]]


def _blobs(p: Array, style: str, background: str) -> list[_Blob]:
    """What is not background, the largest first, three at most."""
    flat = (p - 0.45) / 0.55 if style == "pastel" else p / light(style, SIDE)
    away = np.abs(flat - np.array(BACKGROUNDS[background], np.float32)).max(-1)
    labels, count = ndimage.label(away > 0.22)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    largest = [int(i) + 1 for i in np.argsort(sizes)[::-1][:3] if sizes[i] >= SMALLEST]
    return [_blob(flat, away, labels == i, max(BACKGROUNDS[background])) for i in largest]


def _blob(flat: Array, away: Array, mask: NDArray[np.bool_], ground: float) -> _Blob:
    ys, xs = np.nonzero(mask)
    start = ((xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2, (np.ptp(xs) + 1) / 2, (np.ptp(ys) + 1) / 2)
    box = slice(max(ys.min() - 2, 0), ys.max() + 3), slice(max(xs.min() - 2, 0), xs.max() + 3)
    soft = np.where(ndimage.binary_dilation(mask[box]), np.clip(away[box] / 0.5, 0, 1), 0).astype(np.float32)
    y, x = (np.arange(SIDE, dtype=np.float32)[side] for side in box)
    return _Blob(flat[box], soft, mask[box], x, y, start, ground)


# -- shapes ----------------------------------------------------------------------------------------------------------------------

TOGETHER = 32  # blobs that are fitted side by side
FAR = 1e4  # where the rows and columns lie that fill a blob's box up to the largest one's


def _silhouettes(blobs: Sequence[_Blob]) -> list[tuple[str, tuple[float, ...]]]:
    """The shape of each blob, and its centre and half-extents."""
    rough = np.array([_fit(shape, blobs, [b.start for b in blobs], (0.5,)) for shape in SHAPES])  # [shapes, blobs, 5]
    shapes = rough[..., 0].argmin(0)
    out: dict[int, tuple[str, tuple[float, ...]]] = {}
    for k, shape in enumerate(SHAPES):
        some = np.flatnonzero(shapes == k).tolist()
        fine = _fit(shape, [blobs[i] for i in some], rough[k, some, 1:], (0.5, 0.25, 0.12))
        out |= {i: (shape, tuple(at)) for i, (_, *at) in zip(some, fine.tolist(), strict=True)}
    return [out[i] for i in range(len(blobs))]


def _fit(shape: str, blobs: Sequence[_Blob], starts: Any, steps: tuple[float, ...]) -> Array:
    """Squared error of each blob's silhouette where it is least, centre and half-extents, [blobs, 5]; blobs of like size go together."""
    out, order = np.empty((len(blobs), 5)), np.argsort([b.soft.size for b in blobs], kind="stable")
    for at in range(0, len(order), TOGETHER):
        some = order[at : at + TOGETHER]
        out[some] = _descend(shape, [blobs[i] for i in some], np.array([starts[i] for i in some], np.float64), steps)
    return out


def _descend(shape: str, blobs: Sequence[_Blob], at: Array, steps: tuple[float, ...]) -> Array:
    """Coordinate descent on centre and half-extents [blobs, 4], each blob's own though all take the same steps."""
    h, w = (max(b.soft.shape[i] for b in blobs) for i in (0, 1))
    soft, x, y = np.zeros((len(blobs), h, w), np.float32), np.full((len(blobs), 1, w), FAR), np.full((len(blobs), h, 1), FAR)
    x, y = x.astype(np.float32), y.astype(np.float32)
    for i, blob in enumerate(blobs):
        rows, columns = blob.soft.shape
        soft[i, :rows, :columns], x[i, 0, :columns], y[i, :rows, 0] = blob.soft, blob.x, blob.y

    def error(at: Array, live: NDArray[np.intp]) -> Array:
        cx, cy, w, h = np.maximum(at, (-FAR, -FAR, 0.5, 0.5)).astype(np.float32).T[..., None, None]
        d = signed_distance(shape, np.abs(x[live] - cx), y[live] - cy, w, h, right=True)
        return np.asarray(((np.minimum(np.maximum(0.5 - d, 0), 1) - soft[live]) ** 2).sum((1, 2)))

    best = error(at, np.arange(len(blobs)))
    for step in steps:
        live = np.arange(len(blobs))
        for _ in range(3):
            before = best.copy()
            for move in (sign * step * axis for axis in np.eye(4) for sign in (-1, 1)):
                trial = at[live] + move
                e = error(trial, live)
                better = (trial[:, 2:] > 2).all(1) & (e < best[live])
                best[live[better]], at[live[better]] = e[better], trial[better]
            if not len(live := live[best[live] < before[live]]):
                break
    return np.column_stack([best, at])


# -- attributes and traits ---------------------------------------------------------------------------------------------------------


def _toy(blob: _Blob, shape: str, at: tuple[float, ...]) -> Seen:
    cx, cy, w, h = at
    x, y = blob.x - cx, blob.y[:, None] - cy
    side = 2 * float(np.sqrt(w * h))
    d = signed_distance(shape, x, y, w, h)
    value = blob.pixels.max(-1)
    outline = _outline(d, value, side, blob.ground)
    margins = (d < -outline * side - m for m in (1.0, 0.7, 0.4))  # clear of the rim, where the toy is wide enough
    inner = next((i for i in margins if i.sum() >= 16), d < -outline * side)
    inner = inner if inner.any() else blob.mask  # a blob that is all rim
    hue = _hue(blob.pixels[inner])
    colour = min(COLOURS, key=lambda c: _turn(hue, COLOURS[c]))
    texture, pitch, phase = _texture(value, inner, x / w, y / h, min(w, h))
    offset = (hue - COLOURS[colour] + 180) % 360 - 180
    toy = Toy(shape, colour, texture, float(offset), pitch, phase, outline, float(np.log(h / w)))
    size = min(SIZES, key=lambda s: abs(SIZES[s] - side))
    return Seen(toy, size, float(cx) + 0.5, float(cy) + 0.5)


def _outline(d: Array, value: Array, side: float, ground: float) -> float:
    """The rim's width over the side: the one at which the renderer's rim is as dark, in sum, as what is seen near the edge."""
    near = (d < 0.5) & (d > -0.16 * side - 1)
    d, value = d[near], value[near]

    def dark(v: Array) -> Array:
        return np.asarray(np.clip((0.36 - v) / (0.36 - RIM), 0, 1).sum(-1))

    low, high = TRAITS["outline"]
    widths, inside = np.linspace(low, high * 1.2, 25), np.clip(0.5 - d, 0, 1)
    fills = np.clip(0.5 - d - widths[:, None] * side, 0, 1)  # [25, n]
    expected = dark(VALUE * fills + RIM * (inside - fills) + ground * (1 - inside))
    return float(np.clip(np.interp(dark(value), expected, widths), low, high))


def _hue(pixels: Array) -> float:
    """Median hue in degrees of the saturated pixels [n, 3]."""
    chroma = pixels.max(-1) - pixels.min(-1)
    chosen = np.clip(pixels[chroma >= np.percentile(chroma, 60)], 0, 1) if len(pixels) else np.zeros((1, 3))
    hues = _hues(chosen.astype(np.float64)) * 2 * np.pi
    mean = np.arctan2(np.sin(hues).mean(), np.cos(hues).mean())
    return float(np.degrees(mean + np.median((hues - mean + np.pi) % (2 * np.pi) - np.pi)) % 360)


def _hues(rgb: Array) -> Array:
    """Hue of colours [n, 3], as ``colorsys.rgb_to_hsv`` has it, [n] in [0, 1); 0 of a grey."""
    top, low = rgb.max(1), rgb.min(1)
    r, g, b = (top - rgb.T) / np.where(top == low, 1, top - low)
    sixths = np.select([top == rgb[:, 0], top == rgb[:, 1]], [b - g, 2 + r - b], 4 + g - r)
    return np.asarray(np.where(top == low, 0, sixths / 6 % 1))


def _turn(a: float, b: float) -> float:
    return abs((a - b + 180) % 360 - 180)


PITCHES = np.meshgrid(np.linspace(*TRAITS["pitch"], 15), np.arange(16) / 16 - 0.5, indexing="ij")
AROUND = np.meshgrid(np.linspace(-0.1, 0.1, 9), np.linspace(-0.06, 0.06, 9), indexing="ij")
"""The grid of pitches and phases, and the finer one around its best."""


def _texture(value: Array, inner: NDArray[np.bool_], u: Array, v: Array, extent: float) -> tuple[str, float, float]:
    """The texture whose best pitch and phase explain the dark tone of the inner pixels [h, w], by search on a grid, then a finer one.

    Args:
        u, v: of columns [1, w] and rows [h, 1].
    """
    box = tuple(slice(i.min(), i.max() + 1) for i in np.nonzero(inner))
    inner, u, v = inner[box], u[..., box[1]], v[box[0]]
    top = float(np.percentile(value[box][inner], 90))
    tone = np.where(inner, np.clip((top - value[box]) / (top * (1 - DARK_TONE) + 1e-6), -0.2, 1.2), 0)
    results = {"solid": (float((tone**2).sum() / inner.sum()) - 0.05, 2.0, 0.0)}
    (pitches, phases), (finer, later) = PITCHES, AROUND
    for texture in TEXTURES[1:]:
        _, pitch, phase = _search(texture, tone, inner, u, v, pitches, phases, extent)
        results[texture] = _search(texture, tone, inner, u, v, np.clip(pitch + finer, *TRAITS["pitch"]), phase + later, extent)
    texture = min(results, key=lambda t: results[t][0])
    return texture, results[texture][1], (results[texture][2] + 0.5) % 1.0 - 0.5


def _search(
    texture: str, tone: Array, inner: NDArray[np.bool_], u: Array, v: Array, pitches: Array, phases: Array, extent: float
) -> tuple[float, float, float]:
    """The least mean squared error on a grid, and its pitch and phase; the second tone of stripes is a column's, that of bands a row's."""
    pitch, phase = (g.reshape(-1, 1, 1).astype(np.float32) for g in (pitches, phases))
    model = second_tone(texture, u[None], v[None], pitch, phase, pitch / (2 * extent))  # [grid, h or 1, w or 1]
    alike = tuple(i for i in (0, 1) if model.shape[i + 1] == 1)
    count = inner.sum()
    deviation = np.where(inner, tone - tone.sum() / count, 0)
    weight, told = (a.sum(alike, dtype=np.float64).ravel() for a in (inner, deviation))
    model = model.reshape(len(model), -1).astype(np.float64)
    along, power = model @ told, model**2 @ weight - (model @ weight) ** 2 / count
    strength = np.clip(along / (power + 1e-6), 0.35, 1.2)  # a blurred texture is weaker
    errors = (strength * (strength * power - 2 * along) + (deviation**2).sum()) / count
    best = int(errors.argmin())
    return float(errors[best]), float(pitch[best, 0, 0]), float(phase[best, 0, 0])


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
    matched = match(reading, truth)
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


def match(reading: Reading, truth: Truth) -> list[Seen | None]:
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

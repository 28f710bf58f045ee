"""Draw a scene of the toybox: signed distances, antialiased, as uint8 pictures. About half a millisecond a picture."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .world import BACKGROUNDS, COLOURS, SIZES, Placed, Scene, Toy

Array = NDArray[Any]
SIDE = 64
DARK_TONE = 0.45  # value of a texture's second tone, over the first's
RIM = 0.08  # value of the outline

_STAR = np.array([(np.sin(i * np.pi / 5), -np.cos(i * np.pi / 5)) for i in range(10)]) * np.where(np.arange(10) % 2, 0.58, 1.0)[:, None]
_STAR = (_STAR - (_STAR.max(0) + _STAR.min(0)) / 2) / (np.ptp(_STAR, axis=0) / 2)
_POLYGONS = {"triangle": np.array([(0.0, -1.0), (1.0, 1.0), (-1.0, 1.0), (0.0, -1.0)]), "star": np.vstack([_STAR, _STAR[:1]])}


def _box(x: Array, y: Array, w: float | Array, h: float | Array) -> Array:
    dx, dy = np.abs(x) - w, np.abs(y) - h
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _polygon(x: Array, y: Array, corners: Array, w: float | Array, h: float | Array) -> Array:
    """Signed distance to a polygon of corners [k, 2] in [-1, 1]^2, times half-width and half-height; the last is the first."""
    cx, cy = (np.multiply.outer(column, size).astype(np.float32) for column, size in zip(corners.T, (w, h), strict=True))
    near: Any = np.inf
    inside: Any = False
    for ax, ay, bx, by in zip(cx, cy, cx[1:], cy[1:], strict=False):
        px, py, ex, ey = x - ax, y - ay, bx - ax, by - ay
        t = np.minimum(np.maximum((px * ex + py * ey) / (ex * ex + ey * ey), 0), 1)
        near = np.minimum(near, (px - t * ex) ** 2 + (py - t * ey) ** 2)
        below = (ay <= y) != (by <= y)
        inside = inside ^ (below & (px < py * ex / np.where(ey == 0, np.float32(1e-9), ey)))
    distance = np.sqrt(near)
    return np.where(inside, -distance, distance)


def signed_distance(shape: str, x: Array, y: Array, w: float | Array, h: float | Array, right: bool = False) -> Array:
    """Distance in pixels to a shape of half-width ``w`` and half-height ``h`` at the origin, negative inside; all of them broadcast.

    ``right``: no x is negative, so that the left half of a polygon need not be looked at.
    """
    if shape == "square":
        return _box(x, y, w, h)
    if shape == "cross":
        return np.minimum(_box(x, y, w, 0.42 * h), _box(x, y, 0.42 * w, h))
    if shape in _POLYGONS:
        corners = _POLYGONS[shape]
        return _polygon(x, y, corners[: len(corners) // 2 + 1] if right else corners, w, h)
    r = np.sqrt((x / w) ** 2 + (y / h) ** 2) + 1e-6  # an ellipse's distance to first order: f / |grad f|
    slope = np.sqrt((x / w**2) ** 2 + (y / h**2) ** 2) / r + 1e-6
    if shape == "circle":
        return (r - 1) / slope
    if shape == "ring":
        return np.maximum(r - 1, 0.42 - r) / slope
    raise ValueError(f"unknown shape {shape!r}")


def second_tone(texture: str, u: Array, v: Array, pitch: float | Array, phase: float | Array, soft: float | Array) -> Array:
    """How much of a texture's second tone lies at (u, v) in [-1, 1]^2, in [0, 1]; ``soft`` is the edge's width in cycles."""
    if texture == "solid":
        return np.zeros(np.broadcast_shapes(u.shape, v.shape, np.shape(pitch)), np.float32)
    stripes, bands = (
        np.cos(2 * np.pi * (u * pitch / 2 + phase)),
        np.cos(2 * np.pi * (v * pitch / 2 + (phase if texture == "banded" else 0))),
    )
    level = {"striped": stripes, "banded": bands, "checkered": stripes * bands}[texture]
    return np.clip(0.5 - level / (2 * np.pi * soft), 0, 1)


def toy_rgb(toy: Toy) -> Array:
    """The toy's first tone, rgb in [0, 1]."""
    hue = (COLOURS[toy.colour] + toy.hue) % 360 / 360
    return np.array(colorsys.hsv_to_rgb(hue, 0.85, 0.95), np.float32)


def paint(canvas: Array, placed: Placed, scale: float = 1.0) -> Array:
    """Draw one toy onto ``canvas`` [H, W, 3] in place; returns its coverage [H, W]. ``scale``: pixels a world pixel."""
    toy, side = placed.toy, SIZES[placed.size] * scale
    w, h = side / 2 * np.exp(-toy.aspect / 2), side / 2 * np.exp(toy.aspect / 2)
    cx, cy = placed.x * scale - 0.5, placed.y * scale - 0.5
    top, left = max(int(cy - h - 2), 0), max(int(cx - w - 2), 0)
    bottom, right = min(int(cy + h + 3), canvas.shape[0]), min(int(cx + w + 3), canvas.shape[1])
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
    x, y = x - cx, y - cy
    d = signed_distance(toy.shape, x, y, w, h)
    inside = np.clip(0.5 - d, 0, 1)
    fill = np.clip(0.5 - d - toy.outline * side, 0, 1)
    tone = 1 - (1 - DARK_TONE) * second_tone(toy.texture, x / w, y / h, toy.pitch, toy.phase, toy.pitch / (2 * min(w, h)))
    colour = toy_rgb(toy) * (tone * fill)[..., None] + RIM * (inside - fill)[..., None]
    patch = canvas[top:bottom, left:right]
    patch *= 1 - inside[..., None]
    patch += colour
    coverage = np.zeros(canvas.shape[:2], np.float32)
    coverage[top:bottom, left:right] = inside
    return coverage


def light(style: str, side: int) -> Array:
    """A style's light on the picture, [side, side, 1], at most 1."""
    y, x = (np.mgrid[0:side, 0:side].astype(np.float32) + 0.5) / side
    if style == "shaded":
        return (1.0 - 0.45 * y)[..., None]
    if style == "spotlight":
        return (1.0 - 1.1 * np.clip(np.hypot(x - 0.5, y - 0.5) - 0.25, 0, None))[..., None]
    return np.ones((side, side, 1), np.float32)


def stylise(picture: Array, style: str) -> Array:
    """Apply a style to a flat picture [H, W, 3] in [0, 1]."""
    picture = picture * light(style, picture.shape[0])
    return 0.45 + 0.55 * picture if style == "pastel" else picture


def draw(scene: Scene, side: int = SIDE) -> tuple[NDArray[np.uint8], list[Array]]:
    """Render a scene as uint8 [side, side, 3], with the coverage [side, side] of each toy."""
    canvas = np.empty((side, side, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    masks = [paint(canvas, placed, side / SIDE) for placed in scene.toys]
    return (stylise(canvas, scene.style) * 255 + 0.5).astype(np.uint8), masks


def portrait(toy: Toy, background: str, side: int = 48) -> NDArray[np.uint8]:
    """The toy alone and large, as a crop of another picture of it would show it: uint8 [side, side, 3]."""
    canvas = np.empty((side, side, 3), np.float32)
    canvas[:] = BACKGROUNDS[background]
    scale = side / 32  # the large toy (25.5 px) fills four fifths
    paint(canvas, Placed(toy, "large", 16.0, 16.0), scale)
    return (canvas * 255 + 0.5).astype(np.uint8)

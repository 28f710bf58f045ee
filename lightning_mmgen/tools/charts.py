"""Small charts as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
"""Of the runs, in order: told apart by colour-blind readers (Okabe & Ito)."""

WIDTH, HEIGHT, LEFT, BELOW = 320, 170, 46, 20


def colour(index: int) -> str:
    """The colour of run ``index``."""
    return COLOURS[index % len(COLOURS)]


def lines(curves: Sequence[Sequence[tuple[int, float]]]) -> Markup:
    """One line a run: (step, value) pairs; an empty curve draws nothing."""
    finite = [[(s, v) for s, v in curve if math.isfinite(v)] for curve in curves]
    points = [p for curve in finite for p in curve]
    if not points:
        return Markup("")
    (x0, x1), (y0, y1) = _range([p[0] for p in points]), _range([p[1] for p in points])

    def at(step: float, value: float) -> str:
        x = LEFT + (step - x0) / (x1 - x0) * (WIDTH - LEFT - 8)
        return f"{x:.1f},{(HEIGHT - BELOW) - (value - y0) / (y1 - y0) * (HEIGHT - BELOW - 8):.1f}"

    parts = [_axes(x0, x1, y0, y1)]
    for k, curve in enumerate(finite):
        if len(curve) == 1:
            x, y = at(*curve[0]).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour(k)}"/>')
        elif curve:
            parts.append(f'<polyline fill="none" stroke="{colour(k)}" stroke-width="1.6" points="{" ".join(at(*p) for p in curve)}"/>')
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">{"".join(parts)}</svg>')


def bars(groups: Sequence[str], values: Sequence[Sequence[tuple[float, float] | None]]) -> Markup:
    """Grouped bars with their intervals: ``values[group][run]`` is (mean, half-width), or None where a run has none."""
    known = [v for group in values for v in group if v is not None and math.isfinite(v[0])]
    if not known:
        return Markup("")
    runs, thick, gap, width = max(len(g) for g in values), 12, 14, 560
    top = max(1e-9, *(m + (w if math.isfinite(w) else 0) for m, w in known))
    parts, y = [], 4
    for name, group in zip(groups, values, strict=True):
        parts.append(f'<text x="140" y="{y + runs * thick / 2 + 4}" text-anchor="end">{escape(name)}</text>')
        for k, value in enumerate(group):
            if value is not None and math.isfinite(value[0]):
                parts.append(_bar(value, y + k * thick, thick - 2, (width - 210) / top, colour(k)))
        y += runs * thick + gap
    return Markup(f'<svg viewBox="0 0 {width} {y}" width="{width}" height="{y}">{"".join(parts)}</svg>')


def _bar(value: tuple[float, float], y: float, height: float, scale: float, fill: str) -> str:
    mean, half = value
    end, middle = 150 + max(mean, 0) * scale, y + height / 2
    low, high = (150 + max(mean + s * half, 0) * scale for s in (-1, 1)) if math.isfinite(half) else (end, end)
    whisker = f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="#222"/>'
    label = f'<text x="{high + 5:.1f}" y="{middle + 4}">{mean:.3g}</text>'
    return f'<rect x="150" y="{y}" width="{end - 150:.1f}" height="{height}" fill="{fill}" opacity=".8"/>{whisker}{label}'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _axes(x0: float, x1: float, y0: float, y1: float) -> str:
    floor, texts = HEIGHT - BELOW, []
    for x, y, anchor, value in (
        (LEFT, HEIGHT - 5, "start", x0),
        (WIDTH - 8, HEIGHT - 5, "end", x1),
        (LEFT - 4, floor, "end", y0),
        (LEFT - 4, 14, "end", y1),
    ):
        texts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{value:.3g}</text>')
    return f'<path d="M{LEFT},6 V{floor} H{WIDTH - 8}" fill="none" stroke="#bbb"/>{"".join(texts)}'

"""``mmgen encoders``: the vision-language encoders that an experiment may name."""

from __future__ import annotations

import inspect
import sys

from ..models.encoder import encoders


def table() -> str:
    """Class, default weights, tokens a reference, and what it reads, a line each under a header."""
    rows = [("encoder", "weights by default", "tokens", "what it is")]
    for kind in encoders():
        default = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
        what = (sys.modules[kind.__module__].__doc__ or "").splitlines()[0]
        rows.append((kind.__name__, str(default["pretrained"]), str(default["image_tokens"]), what))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows)

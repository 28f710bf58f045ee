"""``mmgen encoders``: the vision-language encoders that an experiment may name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from .. import models
from ..models.encoder import Encoder


def encoders() -> list[type[Encoder]]:
    """Every encoder in ``lightning_mmgen.models``, by name."""
    for module in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
        importlib.import_module(module.name)
    return sorted((e for e in Encoder.__subclasses__() if e.__module__.startswith(models.__name__)), key=lambda e: e.__name__)


def table() -> str:
    """Class, default weights, tokens a reference, and what it reads, a line each under a header."""
    rows = [("encoder", "weights by default", "tokens", "what it is")]
    for kind in encoders():
        default = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
        what = (importlib.import_module(kind.__module__).__doc__ or "").splitlines()[0]
        rows.append((kind.__name__, str(default["pretrained"]), str(default["image_tokens"]), what))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows)

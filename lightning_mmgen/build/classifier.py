"""Any image classifier of ``transformers``, asked for one of its classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image
from transformers import pipeline

from ..models.weights import locate


class Classifier:
    """The probability of one class.

    Args:
        pretrained: hub name or folder.
        label: the class.
        device: where it runs.

    Raises:
        ValueError: it has no such class.
    """

    def __init__(self, pretrained: str, label: str, device: str = "cpu") -> None:
        self.label = label
        self.pipe: Any = pipeline("image-classification", model=locate(pretrained), device=device)
        if label not in (known := self.pipe.model.config.label2id):
            raise ValueError(f"{pretrained}: has no label {label!r}; there are {', '.join(known)}")

    def __call__(self, images: Sequence[Image]) -> list[float]:
        """From 0 to 1, of each image."""
        rows = self.pipe(list(images), top_k=None, batch_size=len(images))
        return [next(one["score"] for one in row if one["label"] == self.label) for row in rows]

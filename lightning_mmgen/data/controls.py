"""Control pictures, which show a target's layout: canny edges by opencv, depth by a model of ``transformers``, sketches by PiDiNet."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from PIL.Image import Image

Control = Callable[[Image], Image]


class Edge:
    """Canny edges, white on black.

    Args:
        low, high: thresholds on the gradient's magnitude, in grey levels (ControlNet's defaults).

    Raises:
        ImportError: opencv is not installed.
    """

    def __init__(self, low: float = 100.0, high: float = 200.0) -> None:
        if find_spec("cv2") is None:
            raise ImportError("edge pictures need opencv: pip install 'lightning_mmgen[control]'")
        self.low, self.high = low, high

    def __call__(self, picture: Image) -> Image:
        import cv2

        return PILImage.fromarray(cv2.Canny(np.array(picture.convert("L")), self.low, self.high)).convert("RGB")


class Depth:
    """Depth, near is bright, by any depth-estimation model of ``transformers``; read when first asked for, in each process.

    Args:
        pretrained: hub name or folder.
    """

    def __init__(self, pretrained: str) -> None:
        self.pretrained = pretrained

    def __call__(self, picture: Image) -> Image:
        model, processor = _depth(self.pretrained)
        with torch.no_grad():
            out = model(**processor(images=picture, return_tensors="pt"))
        depth = processor.post_process_depth_estimation(out, [picture.size[::-1]])[0]["predicted_depth"]
        depth = (depth - depth.min()) / (depth.max() - depth.min()).clamp(min=torch.finfo(depth.dtype).tiny)
        return PILImage.fromarray((depth * 255).round().to(torch.uint8).numpy()).convert("RGB")


@cache
def _depth(pretrained: str) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    return AutoModelForDepthEstimation.from_pretrained(pretrained).eval(), AutoImageProcessor.from_pretrained(pretrained)


class Sketch:
    """Soft edges by PiDiNet, of the package ``controlnet_aux``.

    Args:
        pretrained: hub name or folder of its annotators.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self, pretrained: str = "lllyasviel/Annotators") -> None:
        if find_spec("controlnet_aux") is None:
            raise ImportError("sketches need PiDiNet: pip install controlnet_aux")
        self.pretrained = pretrained

    def __call__(self, picture: Image) -> Image:
        side = min(picture.size)
        drawn = _pidinet(self.pretrained)(picture, detect_resolution=side, image_resolution=side)
        return drawn.convert("RGB").resize(picture.size)  # type: ignore[no-any-return]


@cache
def _pidinet(pretrained: str) -> Any:
    from controlnet_aux import PidiNetDetector

    return PidiNetDetector.from_pretrained(pretrained)


def makers(kinds: tuple[str, ...], depth_model: str | None) -> dict[str, Control]:
    """What makes each kind of control picture here. Left out, so that only records which bring them have them: depth without a
    model, sketches without PiDiNet's package.

    Raises:
        ImportError: edges are asked for without opencv.
    """
    made: dict[str, Control] = {}
    if "edge" in kinds:
        made["edge"] = Edge()
    if "depth" in kinds and depth_model:
        made["depth"] = Depth(depth_model)
    if "sketch" in kinds and find_spec("controlnet_aux"):
        made["sketch"] = Sketch()
    return made

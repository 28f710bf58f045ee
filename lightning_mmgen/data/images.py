"""Pictures of any mode as upright RGB, and as tensors; limits that keep a hostile file from filling the memory."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageOps
from PIL.Image import Image
from torch import Tensor

from ..prompt import Picture, RecordError

MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


def locate_file(path: str, root: Path) -> Path:
    """A record's path as a file inside ``root``.

    Raises:
        RecordError: the file is missing, or lies outside ``root``.
    """
    full = (root / path).resolve()
    if not full.is_relative_to(root.resolve()):
        raise RecordError(f"{path}: leaves the data folder")
    if not full.is_file():
        raise RecordError(f"{path}: no such file")
    return full


def open_picture(picture: Picture, root: Path | None = None) -> Image:
    """Any picture (path, bytes, in memory; CMYK, palette, 16 bit, alpha, rotated by EXIF) as upright RGB.

    Transparent parts become white. 16-bit and floating-point greys are scaled to 8 bit by their own range.

    Raises:
        RecordError: missing, unreadable, truncated, of another format, or more than ``MAX_PIXELS`` pixels.
    """
    name = picture if isinstance(picture, str) else "picture"
    if isinstance(picture, Image):
        return _rgb(picture)
    source = io.BytesIO(picture) if isinstance(picture, bytes) else locate_file(picture, root or Path.cwd())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            with PILImage.open(source, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise RecordError(f"{name}: {image.width} x {image.height} is over {MAX_PIXELS} pixels")
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
        raise RecordError(f"{name}: over {MAX_PIXELS} pixels") from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{name}: cannot be read as a picture ({type(error).__name__}: {str(error)[:80]})") from error


def _rgb(image: Image) -> Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(float(grey.max()), 1e-9)
        return PILImage.fromarray((np.clip(grey / top, 0, 1) * 255 + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = PILImage.new("RGBA", image.size, "white")
        return PILImage.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def pad_square(image: Image, fill: str = "black") -> Image:
    """Pad to a square, the picture in the middle (MUMU, section 4: black)."""
    return ImageOps.pad(image, (max(image.size),) * 2, color=fill) if image.width != image.height else image


def pixels(picture: Picture, side: int | None = None, root: Path | None = None) -> Tensor:
    """A picture as [3, h, w] in [-1, 1]; with ``side``, padded to a square and resized to it, up or down."""
    image = open_picture(picture, root)
    if side is not None:
        image = pad_square(image)
        image = image if image.size == (side, side) else image.resize((side, side), PILImage.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

"""Pictures of any mode as upright RGB, and as tensors; limits that keep a hostile file from filling the memory."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError
from PIL.Image import Image
from torch import Tensor

from ..prompt import Picture, RecordError

Edges = tuple[float, float, float, float]
"""Left, top, right and bottom of a box, in pixels."""

MAX_PIXELS = 64_000_000
ORIENTATION = 0x0112  # the EXIF tag
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


def locate_file(path: str, root: Path) -> Path:
    """A record's path as a file inside ``root``.

    Raises:
        RecordError: the file is missing, or lies outside ``root``.
    """
    try:
        full = (root / path).resolve()
        inside, there = full.is_relative_to(root.resolve()), full.is_file()
    except (OSError, ValueError) as error:  # too long, or a null byte
        raise RecordError(f"{path[:80]!r} is not a path") from error
    if not inside:
        raise RecordError(f"{path}: leaves the data folder")
    if not there:
        raise RecordError(f"{path}: no such file")
    return full


def open_picture(picture: Picture, root: Path | None = None, alpha: bool = False) -> Image:
    """Any picture (path, bytes, in memory; CMYK, palette, 16 bit, alpha, rotated by EXIF) as upright RGB, or RGBA with ``alpha``.

    In RGB transparent parts become white, and 16-bit and floating-point greys are scaled to 8 bit by their own range.

    Raises:
        RecordError: missing, unreadable, truncated, of another format, or more than ``MAX_PIXELS`` pixels.
    """
    name = picture if isinstance(picture, str) else "picture"
    if isinstance(picture, str):
        picture = str(locate_file(picture, root or Path.cwd()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            if isinstance(picture, Image):
                return _upright(picture, alpha)
            with PILImage.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture, formats=FORMATS) as image:
                return _upright(image, alpha)
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
        raise RecordError(f"{name}: over {MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise RecordError(f"{name}: not a picture of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # decoders raise anything, from struct.error to TypeError, on a damaged file
        raise RecordError(f"{name}: cannot be read as a picture ({type(error).__name__}: {str(error)[:80]})") from error


def picture_size(picture: Picture, root: Path | None = None) -> tuple[int, int]:
    """Width and height of any picture, upright; of a file only its head is read.

    Raises:
        RecordError: missing, or of another format.
    """
    if isinstance(picture, str):
        picture = str(locate_file(picture, root or Path.cwd()))
    try:
        with (
            nullcontext(picture)
            if isinstance(picture, Image)
            else PILImage.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture, formats=FORMATS) as image
        ):
            turned = image.getexif().get(ORIENTATION, 1) >= 5
            return (image.height, image.width) if turned else (image.width, image.height)
    except Exception as error:  # as above
        raise RecordError(f"cannot be read as a picture ({type(error).__name__})") from error


def encode_png(picture: Picture, root: Path | None = None) -> bytes:
    """Any picture as the bytes of an upright RGB PNG.

    Raises:
        RecordError: it cannot be read.
    """
    buffer = io.BytesIO()
    open_picture(picture, root).save(buffer, "PNG")
    return buffer.getvalue()


def _upright(image: Image, alpha: bool) -> Image:
    if image.width * image.height > MAX_PIXELS:
        raise PILImage.DecompressionBombError
    image = ImageOps.exif_transpose(image)
    return image.convert("RGBA") if alpha else _rgb(image)


def _rgb(image: Image) -> Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = 65535.0 if image.mode.startswith("I") else max(float(grey.max()), 1e-9)
        return PILImage.fromarray((np.clip(grey / top, 0, 1) * 255 + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = PILImage.new("RGBA", image.size, "white")
        return PILImage.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def pad_square(image: Image, fill: str = "black") -> Image:
    """Pad to a square, the picture in the middle (MUMU, section 4: black). A long strip whose square would have more than
    ``MAX_PIXELS`` pixels is shrunk first."""
    if image.width == image.height:
        return image
    if max(image.size) ** 2 > MAX_PIXELS:
        image = image.copy()
        image.thumbnail((math.isqrt(MAX_PIXELS),) * 2)
    return ImageOps.pad(image, (max(image.size),) * 2, color=fill)


def pixels(picture: Picture, side: int | None = None, root: Path | None = None) -> Tensor:
    """A picture as [3, h, w] in [-1, 1]; with ``side``, padded to a square and resized to it, up or down."""
    image = open_picture(picture, root)
    if side is not None:
        image = pad_square(image)
        image = image if image.size == (side, side) else image.resize((side, side), PILImage.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def other_aspect(a: tuple[int, int], b: tuple[int, int], most: float) -> bool:
    """Whether the aspects of two sizes (width, height) differ by a ratio over ``most``."""
    ratio = a[0] * b[1] / (a[1] * b[0])
    return max(ratio, 1 / ratio) > most


def square_around(size: tuple[int, int], edges: Sequence[Edges]) -> tuple[int, int, int, int]:
    """The largest square of a picture of this size (width, height), as near to the middle of these boxes, or else of the picture, as it can
    be: left, top, right, bottom in pixels."""
    side = min(size)

    def begin(length: int, low: list[float], high: list[float]) -> int:
        if not low:
            return (length - side) // 2
        middle = (min(low) + max(high)) / 2
        return round(min(max(middle - side / 2, 0), length - side))

    left = begin(size[0], [e[0] for e in edges], [e[2] for e in edges])
    top = begin(size[1], [e[1] for e in edges], [e[3] for e in edges])
    return left, top, left + side, top + side


def crop(picture: Tensor, size: Sequence[int]) -> Tensor:
    """The centre of a picture [3, h, w], as large as its aspect allows, as [3, *size], resized with antialiasing."""
    (_, h, w), (height, width) = picture.shape, size
    inner_h, inner_w = (h, round(h * width / height)) if h * width <= w * height else (round(w * height / width), w)
    inner_h, inner_w = max(inner_h, 1), max(inner_w, 1)
    top, left = (h - inner_h) // 2, (w - inner_w) // 2
    centre = picture[:, top : top + inner_h, left : left + inner_w]
    if (inner_h, inner_w) == (height, width):
        return centre.contiguous()
    return torch.nn.functional.interpolate(centre[None], (height, width), mode="bicubic", antialias=True)[0].clamp(-1, 1)


def crop_square(picture: Tensor, side: int) -> Tensor:
    """The centre of a picture [3, h, w] as [3, side, side], resized with antialiasing."""
    return crop(picture, (side, side))


def sdxl_sizes(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, ...]:
    """What SDXL is told of a centre crop (Podell et al. 2023, section 2.2): the picture's size, where the crop begins once the picture is
    resized to cover the target, and the target's size; each height first."""
    scale = max(size[0] / original[0], size[1] / original[1])
    top, left = ((round(o * scale) - s) // 2 for o, s in zip(original, size, strict=True))
    return (*original, max(top, 0), max(left, 0), *size)

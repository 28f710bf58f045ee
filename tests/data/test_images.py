from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from PIL.Image import Image

from lightning_mmgen.data.images import MAX_PIXELS, open_picture, pad_square, pixels
from lightning_mmgen.prompt import Picture, RecordError


def encoded(image: Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int) -> Image:
    return PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def grey16(value: int) -> Image:
    return PILImage.fromarray(np.full((4, 4), value, np.uint16))


RED, WHITE = (255, 0, 0), (255, 255, 255)
PALETTE = PILImage.new("P", (4, 4), 1)
PALETTE.putpalette([0, 0, 0, 10, 200, 30])

MODES: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "RGB": (encoded(PILImage.new("RGB", (4, 4), (1, 2, 3))), (1, 2, 3)),
    "grey": (encoded(PILImage.new("L", (4, 4), 77)), (77, 77, 77)),
    "1-bit": (encoded(PILImage.new("1", (4, 4), 1)), WHITE),
    "CMYK": (encoded(PILImage.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), RED),
    "palette": (encoded(PALETTE), (10, 200, 30)),
    "palette, transparent": (encoded(PALETTE, transparency=1), WHITE),
    "RGB with a transparent colour": (encoded(PILImage.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)), WHITE),
    "GIF": (encoded(PALETTE, "GIF"), (10, 200, 30)),
    "16 bit": (encoded(grey16(32896)), (128, 128, 128)),
    "16 bit TIFF": (encoded(grey16(65535), "TIFF"), WHITE),
    "32 bit": (encoded(PILImage.fromarray(np.full((4, 4), 32896, np.int32)), "TIFF"), (128, 128, 128)),
    "float": (encoded(PILImage.fromarray(np.linspace(0, 0.5, 16, dtype=np.float32).reshape(4, 4)[::-1, ::-1]), "TIFF"), WHITE),
    "float, not a number": (encoded(PILImage.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), (0, 0, 0)),
    "alpha 0": (encoded(PILImage.new("RGBA", (4, 4), (*RED, 0))), WHITE),
    "alpha 1/2": (encoded(PILImage.new("RGBA", (4, 4), (*RED, 128))), (255, 127, 127)),
    "alpha 1": (encoded(PILImage.new("RGBA", (4, 4), (*RED, 255))), RED),
    "LA": (encoded(PILImage.new("LA", (4, 4), (0, 128))), (127, 127, 127)),
    "WebP": (encoded(PILImage.new("RGBA", (4, 4), (*RED, 255)), "WEBP", lossless=True), RED),
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.filterwarnings("error")
def test_every_mode_becomes_rgb(name: str) -> None:
    data, colour = MODES[name]
    image = open_picture(data)
    assert image.mode == "RGB" and image.size == (4, 4)
    assert image.getpixel((0, 0)) == colour


def test_cmyk_jpeg_becomes_rgb() -> None:
    pixel = open_picture(encoded(PILImage.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).getpixel((8, 8))
    assert np.abs(np.array(pixel) - RED).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone_for_files_and_pictures_in_memory(orientation: int) -> None:
    upright = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    undo: dict[int, Callable[[Any], Any]] = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose}
    undo |= {6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).T, 8: np.rot90}
    image = PILImage.fromarray(upright)
    image.getexif()[0x0112] = orientation
    expected = undo.get(orientation, lambda a: a)(upright)
    for picture in (encoded(image, exif=image.getexif()), image):
        assert np.array_equal(np.array(open_picture(picture))[..., 0], expected)


def test_transparency_of_every_mode_is_kept_where_it_is_asked_for() -> None:
    clear = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
    grey = PILImage.fromarray(np.stack([np.full((4, 4), 90, np.uint8), clear], -1))  # LA
    palette = PILImage.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("P")
    palette.save(file := io.BytesIO(), "PNG", transparency=bytes(clear.ravel()))
    for picture in (grey, file.getvalue()):
        image = open_picture(picture, alpha=True)
        assert image.mode == "RGBA" and np.array_equal(np.asarray(image)[..., 3], clear)
    assert np.asarray(open_picture(PILImage.new("RGB", (2, 2)), alpha=True))[..., 3].min() == 255


def test_a_picture_in_memory_is_not_changed() -> None:
    image = PILImage.new("RGBA", (3, 2), (*RED, 0))
    assert open_picture(image).getpixel((0, 0)) == WHITE
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (*RED, 0)


# orientation 6 (a short), and a resolution that is the text "ab" where a fraction belongs
EXIF_OF_WORDS = b"Exif\0\0II*\0" + struct.pack("<IHHHIHHHHI4sI", 8, 2, 0x0112, 3, 1, 6, 0, 0x011A, 2, 3, b"ab\0\0", 0)

DAMAGED: dict[str, bytes] = {
    "truncated JPEG": encoded(noise(64, 64), "JPEG")[:2000],
    "truncated PNG": encoded(noise(64, 64))[:-40],
    "text": b"hello, this is not a picture",
    "nothing": b"",
    "another format": encoded(noise(4, 4), "ICO"),
    "EXIF with words for a resolution": encoded(noise(4, 4), exif=EXIF_OF_WORDS),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_picture_is_one_line(name: str) -> None:
    with pytest.raises(RecordError) as caught:
        open_picture(DAMAGED[name])
    assert str(caught.value).startswith("picture: ") and "\n" not in str(caught.value) and "0x" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, on damaged metadata
def test_damage_of_any_kind_is_a_record_error() -> None:
    rng = np.random.default_rng(0)
    image = noise(16, 16)
    image.getexif()[0x0112] = 6
    for kind in ("JPEG", "TIFF", "WEBP"):
        whole = encoded(image, kind, exif=image.getexif())
        for _ in range(100):
            data = bytearray(whole)
            for place in rng.integers(min(len(data), 160), size=3):
                data[place] = rng.integers(256)
            try:
                assert open_picture(bytes(data)).mode == "RGB"
            except RecordError:
                pass


@pytest.mark.parametrize("side", [9000, 12000, 15000])  # Pillow itself: nothing, a warning, an error
def test_a_decompression_bomb_is_refused_unread(side: int) -> None:
    bomb = encoded(PILImage.new("1", (side, side)))
    assert len(bomb) < 64_000
    with pytest.raises(RecordError, match=f"over {MAX_PIXELS} pixels"):
        open_picture(bomb)


def test_a_long_strip_does_not_grow_to_a_bomb_of_a_square() -> None:
    strip = encoded(PILImage.new("RGB", (100_000, 2), RED))
    out = pixels(strip, 16)
    assert out.shape == (3, 16, 16)
    assert pad_square(open_picture(strip)).width ** 2 <= MAX_PIXELS


@pytest.mark.parametrize("path", ["../secret.png", "sub/../../secret.png", "link.png"])
def test_a_path_may_not_leave_the_folder(path: str, tmp_path: Path) -> None:
    noise(4, 4).save(tmp_path / "secret.png")
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(RecordError, match="leaves the data folder"):
        open_picture(path, tmp_path / "data")
    with pytest.raises(RecordError, match="leaves the data folder"):
        open_picture(str(tmp_path / "secret.png"), tmp_path / "data")


NO_FILES = [("gone.png", "no such file"), (".", "no such file"), ("a\0b", "not a path"), ("x" * 5000, "not a path")]


@pytest.mark.parametrize(("path", "reason"), NO_FILES)
def test_a_path_without_a_file_is_refused(path: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=reason):
        open_picture(path, tmp_path)


def test_a_path_is_relative_to_the_root_and_named_in_errors(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    noise(4, 6).save(tmp_path / "sub" / "a.png")
    assert open_picture("sub/a.png", tmp_path).size == (6, 4)
    (tmp_path / "sub" / "b.png").write_bytes(b"text")
    with pytest.raises(RecordError, match=r"^sub/b\.png: not a picture"):
        open_picture("sub/b.png", tmp_path)


def test_pixels_are_channels_first_in_minus_one_to_one() -> None:
    image = noise(5, 7)
    out = pixels(image)
    assert out.shape == (3, 5, 7) and out.dtype == torch.float32
    assert torch.allclose(out, torch.from_numpy(np.array(image).transpose(2, 0, 1) / 255 * 2 - 1).float(), atol=1e-6)


@pytest.mark.parametrize(("size", "bars"), [((8, 4), (slice(0, 2), slice(None))), ((4, 8), (slice(None), slice(0, 2)))])
def test_a_reference_is_padded_with_black_to_a_square(size: tuple[int, int], bars: tuple[slice, slice]) -> None:
    picture: Picture = PILImage.new("RGB", size, "white")
    out = pixels(picture, 8)
    assert out.shape == (3, 8, 8)
    assert (out[(slice(None), *bars)] == -1).all() and (out == 1).float().mean() == 0.5
    assert pixels(picture, 20).shape == (3, 20, 20) and pixels(picture, 3).shape == (3, 3, 3)

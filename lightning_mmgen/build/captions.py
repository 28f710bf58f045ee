"""Captioned pictures, as the builders read them: from a COCO file, from JSONL rows, or from texts beside the pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..data.images import Edges
from ..prompt import MARKER

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


class Found(NamedTuple):
    """Where a phrase of a caption lies, in the units of its picture's ``frame``.

    Attributes:
        phrase, start: the words, and where they begin in the caption.
        box: left, top, right, bottom.
        score: how sure it is, 1 for boxes that people drew.
        person: whether it shows a person or people.
        head: the box of the person's head, where it is known.
    """

    phrase: str
    start: int
    box: Edges
    score: float = 1.0
    person: bool = False
    head: Edges | None = None


class Caption(NamedTuple):
    """One caption, on one line; its boxes where they exist already, and how many were dropped by which rule when they were read."""

    text: str
    found: tuple[Found, ...] | None = None
    dropped: Mapping[str, int] = {}


class Scene(NamedTuple):
    """A picture and its captions.

    Attributes:
        image: path in the folder of the pictures.
        captions: each becomes a record of its own.
        frame: width and height that the boxes are measured in; (1, 1) for shares of the picture.
    """

    image: str
    captions: tuple[Caption, ...]
    frame: tuple[float, float] = (1.0, 1.0)


def line(text: str) -> str:
    """A caption without line breaks and double spaces."""
    return " ".join(text.split())


def read_lines(path: str) -> list[str]:
    """The different lines of a text file in their order, without empty ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no line is left, or one holds a ``[ref#k]`` marker.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with Path(path).open(encoding="utf-8") as file:
        lines = [" ".join(line.split()) for line in file]
    for number, line in enumerate(lines, 1):
        if MARKER.search(line):
            raise ValueError(f"{path}:{number}: holds a [ref#k] marker, but these pictures have no references")
    if not (different := list(dict.fromkeys(filter(None, lines)))):
        raise ValueError(f"{path}: holds no lines")
    return different


def read_captions(path: str | None, images: str) -> list[Scene]:
    """Pictures with their captions, in a fixed order.

    Args:
        path: a COCO ``.json``, a ``.jsonl`` of rows {image, caption}, a folder of ``.txt`` files named as the pictures, or None for texts
            that lie beside the pictures.
        images: folder of the pictures.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another form, or without captions; the message names it and its row.
    """
    place = Path(path or images)
    if place.is_dir():
        scenes = [Scene(image, (Caption(text),)) for image, text in _texts(place, Path(images))]
    elif place.suffix == ".jsonl":
        scenes = [Scene(image, captions) for image, captions in _rows(place).items()]
    else:
        scenes = [Scene(image["file_name"], tuple(map(Caption, texts))) for image, texts in coco_captions(read_json(place), str(place))]
    if not scenes:
        raise ValueError(f"{place}: holds no captions")
    return scenes


def read_json(path: Path) -> Any:
    """Raises: ValueError: not JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows and where they are, ``file:row``. Raises: ValueError: a row that is not a JSON object."""
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            try:
                row = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: is not an object")
            yield f"{path}:{number}", row


def coco_captions(data: Any, where: str) -> list[tuple[dict[str, Any], list[str]]]:
    """The images of a COCO file, each with its captions.

    Raises:
        ValueError: not a COCO file, or an annotation of an image that is not there.
    """
    try:
        images = {image["id"]: image for image in data["images"]}
        texts: dict[Any, list[str]] = {key: [] for key in images}
        for annotation in data["annotations"]:
            if "caption" in annotation:
                texts[annotation["image_id"]].append(line(annotation["caption"]))
        return [(image, texts[key]) for key, image in images.items() if texts[key] and image["file_name"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: is not a COCO captions file ({type(error).__name__}: {error})") from error


def _rows(path: Path) -> dict[str, tuple[Caption, ...]]:
    out: dict[str, tuple[Caption, ...]] = {}
    for where, row in read_jsonl(path):
        image, caption = row.get("image"), row.get("caption")
        if not isinstance(image, str) or not isinstance(caption, str):
            raise ValueError(f"{where}: needs the strings image and caption")
        out[image] = (*out.get(image, ()), Caption(line(caption)))
    return out


def _texts(folder: Path, images: Path) -> Iterator[tuple[str, str]]:
    for picture in sorted(p for p in images.rglob("*") if p.suffix.lower() in ENDINGS):
        name = PurePosixPath(picture.relative_to(images).as_posix())
        text = folder / name.with_suffix(".txt")
        if text.is_file():
            yield str(name), line(text.read_text(encoding="utf-8", errors="replace"))

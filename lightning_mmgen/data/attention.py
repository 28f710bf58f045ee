"""Attention targets: where a diffusion model looks for each word of a caption; ``mmgen build attention`` writes them.

A folder of them holds ``index.json``, ``{"version": 1, "size": s, "rows": {id: shard}}``, and its shards. A shard is a safetensors file;
for each id it has one tensor [n, s, s] of 8 bit, a map a word, and in its metadata the JSON ``{"image": hash, "words": [[word, start, end],
...]}``: words in lower case, and where they stand in the caption, in characters. Maps are of the picture padded to a square, as encoders
get it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import whole_file
from ..prompt import Picture, RecordError
from .images import locate_file

VERSION = 1


class Word(NamedTuple):
    """A word in lower case, and where it stands in its caption: characters ``start`` to ``end``."""

    text: str
    start: int
    end: int


class WordMaps(NamedTuple):
    """The maps of one picture.

    Attributes:
        image: the hash of its content, see :func:`content_hash`.
        words: of its caption, in reading order; a word may occur again.
        maps: [n, s, s] in [0, 1], one a word.
    """

    image: str
    words: Sequence[Word]
    maps: Tensor


def content_hash(picture: Picture, root: Path | None = None) -> str:
    """128 bits of BLAKE2b of a picture's file, of its encoded bytes (the same ones), or of its pixels where it is in memory.

    Args:
        root: the folder that paths are relative to, and may not leave.

    Raises:
        RecordError: no such file, or it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(picture, Image):
        digest.update(f"{picture.mode} {picture.size}".encode())
        digest.update(picture.tobytes())
        return digest.hexdigest()
    try:
        digest.update(picture if isinstance(picture, bytes) else locate_file(picture, root or Path.cwd()).read_bytes())
    except OSError as error:
        raise RecordError(f"{picture!r:.80}: {error.strerror}") from error
    return digest.hexdigest()


def write_shard(path: Path, rows: Mapping[str, WordMaps]) -> None:
    """Write the maps of rows by id; the file is there whole or not at all."""
    maps = {id: (row.maps * 255).round().to(torch.uint8).contiguous() for id, row in rows.items()}
    about = {id: json.dumps({"image": row.image, "words": row.words}, ensure_ascii=False) for id, row in rows.items()}
    with whole_file(path, "part") as file:
        file.write(save(maps, about))


def write_index(folder: Path, size: int | None = None) -> Path:
    """Write ``index.json`` over all shards of a folder.

    Args:
        size: of the maps; that of the first by default.

    Raises:
        ValueError: two rows have one id, or maps are of another size.
    """
    rows: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            for id in shard.keys():  # noqa: SIM118 (no mapping)
                if id in rows:
                    raise ValueError(f"{folder}: {rows[id]} and {path.name} both hold a row {id!r}; ids must differ")
                rows[id] = path.name
                if (found := shard.get_slice(id).get_shape()[-1]) != (size := size or found):
                    raise ValueError(f"{path}: {id!r} has maps of {found} x {found}, not {size} x {size}")
    with whole_file(folder / "index.json", "part") as file:
        file.write(json.dumps({"version": VERSION, "size": size or 0, "rows": rows}, ensure_ascii=False).encode())
    return folder / "index.json"


class AttentionTargets:
    """The targets of a folder: ``targets[id, picture]`` is a dict word -> map [s, s] in [0, 1], float32. Repeated words are averaged.

    Args:
        folder: what ``mmgen build attention`` wrote.
        root: the folder that pictures' paths are relative to: the source's.

    Raises:
        FileNotFoundError: no ``index.json`` in the folder.
        ValueError: it is of another version, or damaged.
    """

    def __init__(self, folder: str | Path, root: Path | None = None) -> None:
        self.folder, self.root = Path(folder), root
        path = self.folder / "index.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; `mmgen build attention` writes it when it is done")
        try:
            index = json.loads(path.read_bytes())
            version, self.size, self.shards = index["version"], int(index["size"]), dict(index["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: is not an index of attention targets ({type(error).__name__}: {error})") from error
        if version != VERSION:
            raise ValueError(f"{path}: version {version!r} is not {VERSION}")

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __contains__(self, id: object) -> bool:
        return id in self.shards

    def __getitem__(self, key: tuple[str, Picture]) -> dict[str, Tensor]:
        """Raises: RecordError: the row has no target, its shard is missing or damaged, or its targets are of another picture."""
        id, picture = key
        row = self.read(id)
        if row.image != content_hash(picture, self.root):
            raise RecordError(f"{id!r}: its attention targets in {self.folder} are of another picture, or it has changed since")
        found: dict[str, list[Tensor]] = {}
        for word, one in zip(row.words, row.maps, strict=True):
            found.setdefault(word.text, []).append(one)
        return {word: torch.stack(maps).mean(0) for word, maps in found.items()}

    def read(self, id: str) -> WordMaps:
        """A row as it was written. Raises: as ``targets[id, picture]``, but the picture is not looked at."""
        if id not in self.shards:
            raise RecordError(f"{id!r}: has no attention target in {self.folder}")
        path = self.folder / self.shards[id]
        if not path.is_file():
            raise RecordError(f"{id!r}: its shard {path} is missing")
        try:
            with safe_open(path, "pt") as shard:
                about, maps = json.loads(shard.metadata()[id]), shard.get_tensor(id)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RecordError(f"{id!r}: its shard {path} is damaged ({type(error).__name__})") from error
        return WordMaps(about["image"], [Word(*word) for word in about["words"]], maps.float() / 255)

"""WebDataset shards: tar files in which the members of one key are a record. Local ones are read by row, others from end to end.

A row is ``KEY.json``, a record whose pictures are named by the extensions of their members (``"target": "target.png"`` is
``KEY.target.png``); or ``KEY.txt``, a caption, beside one picture. Nothing in a shard is unpickled, run or looked up elsewhere.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..files import whole_file
from ..prompt import Picture, Record, RecordError, from_json
from .images import encode_png
from .sources import RowError, Source
from .streams import Stream

PICTURES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "ppm")
EXTENSIONS = ("json", "txt", *PICTURES)
PROTOCOLS = ("http", "https", "s3", "gs", "hf", "file")
BLOCK = 512
CUT = "the archive is cut off or damaged here; the rows behind are lost"

# -- tar files -------------------------------------------------------------------------------------------------------------------


def walk(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo | None]:
    """The members of a tar of ``size`` bytes in their order, without folders; None at the end of one that is cut off or damaged."""
    while True:
        try:
            member = tar.next()
        except tarfile.TarError:
            yield None
            return
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
        if member is None:
            break
        if member.offset_data + member.size > size:
            yield None
            return
        if not member.isdir():
            yield member
    file: Any = tar.fileobj
    file.seek(tar.offset)
    if file.read(BLOCK) != bytes(BLOCK):  # tarfile takes a damaged header, and the end of the file, for the end of the archive
        yield None


def split_name(name: str) -> tuple[str, str]:
    """The key and the extension of a member: what comes before and after the first dot of its base name."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def rows_of(tar: tarfile.TarFile, size: int) -> Iterator[tuple[list[tarfile.TarInfo], bool]]:
    """The rows of a tar, members that follow each other under one key, and whether they are whole: the last of an archive that is cut off
    may lack members, and is not."""
    before: list[tarfile.TarInfo] = []
    for key, group in groupby(walk(tar, size), key=lambda m: m and split_name(m.name)[0]):
        if key is None:
            yield before, False
            return
        if before:
            yield before, True
        before = [m for m in group if m is not None]
    if before:
        yield before, True


def open_tar(file: BinaryIO, name: str) -> tarfile.TarFile:
    """Raises: ValueError: no tar file, or a compressed one."""
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.TarError as error:
        raise ValueError(f"{name}: is no uncompressed tar file ({error})") from error


def read_row(tar: tarfile.TarFile, members: Iterable[tarfile.TarInfo]) -> Record:
    """The record that members of one key make.

    Raises:
        RecordError: a member of another kind than ``EXTENSIONS``, the same one twice, or no record among them.
    """
    held: dict[str, bytes] = {}
    key = ""
    for member in members:
        key, extension = split_name(member.name)
        if not member.isfile() or extension.rpartition(".")[2] not in EXTENSIONS:
            raise RecordError(f"{member.name}: a member is a file of the kind {', '.join(EXTENSIONS)}")
        if extension in held:
            raise RecordError(f"{member.name}: comes twice")
        file = tar.extractfile(member)
        assert file is not None
        held[extension] = file.read()
    record = as_record(held)
    return record if record.id else replace(record, id=key)


def as_record(held: Mapping[str, bytes]) -> Record:
    """The record of a row's members by extension, its pictures as bytes.

    Raises:
        RecordError: it is none, or lacks a picture that it names.
    """

    def picture(path: Picture, name: str) -> Picture:
        if not isinstance(path, str) or path.lower() not in held:
            raise RecordError(f"{name} is {str(path)[:80]!r}, and the row has no such member")
        return held[path.lower()]

    if "json" in held:
        try:
            return from_json(json.loads(held["json"])).map_pictures(picture)
        except (RecordError, ValueError, RecursionError) as error:
            raise RecordError(f"not JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error)) from error
    pictures = [data for extension, data in held.items() if extension in PICTURES]
    if "txt" not in held or len(pictures) != 1:
        raise RecordError(f"a row has a .json, or a .txt and one picture, not {', '.join(f'.{e}' for e in held)}")
    caption = held["txt"].decode("utf-8", "replace").strip()
    return Record(caption, target=pictures[0], caption=caption)


# -- rows by place ---------------------------------------------------------------------------------------------------------------


class ShardIndex:
    """Where the rows of a local shard begin; built in one pass over its headers, then kept in a file.

    Args:
        path: of the shard.
        folder: of the index, ``NAME.rows``; beside the shard by default. One of another size or time of the shard is built again.

    Raises:
        FileNotFoundError: no such shard.
        ValueError: no tar file.
        OSError: the index cannot be written.
    """

    VERSION = 1

    def __init__(self, path: Path, folder: Path | None = None) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such shard")
        self.path, status = path, path.stat()
        kept = (folder or path.parent) / f"{path.name}.rows"
        stamp = (self.VERSION, status.st_size, status.st_mtime_ns)
        if (found := self._read(kept, stamp)) is None:
            found = self._scan(status.st_size)
            self._write(kept, stamp, *found)
        self.edges, self.cut = found  # [rows + 1] uint32, in blocks of 512 bytes; whether the last row is not whole
        if self.cut:
            warnings.warn(f"{path}: cut off or damaged after {len(self.edges) - 2} rows", stacklevel=2)

    def _scan(self, size: int) -> tuple[np.ndarray[Any, np.dtype[np.uint32]], bool]:
        starts, end, cut = array("I"), 0, False
        with self.path.open("rb") as file, open_tar(file, str(self.path)) as tar:
            for members, whole in rows_of(tar, size):
                starts.append((members[0].offset if members else 0) // BLOCK)
                cut = not whole
            end = -(-size // BLOCK) if cut else tar.offset // BLOCK
        starts.append(end)
        return np.frombuffer(starts, np.uint32), cut

    @staticmethod
    def _read(path: Path, stamp: tuple[int, ...]) -> tuple[np.ndarray[Any, np.dtype[np.uint32]], bool] | None:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if len(data) < 36 or len(data) % 4 or tuple(np.frombuffer(data, np.int64, 3)) != stamp:
            return None
        return np.frombuffer(data, np.uint32, offset=32), bool(data[24])

    @staticmethod
    def _write(path: Path, stamp: tuple[int, ...], edges: np.ndarray[Any, np.dtype[np.uint32]], cut: bool) -> None:
        try:
            with whole_file(path) as file:
                file.write(np.array([*stamp, cut], np.int64).tobytes() + edges.tobytes())
        except OSError as error:
            raise OSError(
                f"{path}: the index of the shard cannot be written ({error.strerror}); name another folder, index: DIR"
            ) from error


class WebDatasetSource(Source):
    """Rows of local WebDataset shards, by their place: any order, any number of ranks, resumed anywhere. Memory holds 4 bytes a row.

    Args:
        shards: tar files, one or several; ``*`` and ``{000..099}`` stand for many.
        index: folder for the shards' indices; beside them by default.

    Raises:
        FileNotFoundError: no such shard.
        ValueError: no shard, or no row in any; two shards of one name with ``index``.
        OSError: an index cannot be written.
    """

    def __init__(self, shards: str | list[str], index: str | None = None) -> None:
        paths = [Path(p) for p in expand(shards)]
        if index is not None and len({p.name for p in paths}) < len(paths):
            raise ValueError(f"index: {index} needs shards of different names")
        found = [ShardIndex(path, Path(index) if index else None) for path in paths]
        self.shards = [s.path for s in found]
        self.ends = np.cumsum([len(s.edges) - 1 for s in found])
        self.first = np.concatenate([[0], self.ends[:-1]])
        self.cut = {int(end) - 1 for s, end in zip(found, self.ends, strict=True) if s.cut}
        self.edges = np.concatenate([s.edges for s in found])  # a shard has one more than rows
        if not len(self):
            raise ValueError(f"{paths[0]}: holds no rows" + (f", nor do the {len(paths) - 1} other shards" if paths[1:] else ""))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Which shard, and which of its rows."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, index - int(self.first[shard])

    def name(self, index: int, epoch: int = 0) -> str:
        shard, row = self.locate(index)
        return f"{self.shards[shard].name}:{row + 1}"

    def record(self, index: int, epoch: int = 0) -> Record:
        shard, row = self.locate(index)
        path, begin, end = self.shards[shard], *(int(e) * BLOCK for e in self.edges[index + shard : index + shard + 2])
        try:
            if index in self.cut:
                raise RecordError(CUT)
            with path.open("rb") as file:
                file.seek(begin)
                data = file.read(end - begin)
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                return read_row(tar, (m for m in tar if not m.isdir()))
        except (RecordError, tarfile.TarError) as error:
            raise RowError(path.name, row, str(error)) from error

    def fingerprint(self) -> str:
        """Of names, sizes and places of rows; the pictures are not read."""
        held = [(path.name, path.stat().st_size) for path in self.shards]
        return hashlib.sha256(repr(held).encode() + self.edges.tobytes()).hexdigest()


class WebDatasetStream(Stream):
    """Rows of WebDataset shards read from end to end, from a local disk or a URL of ``fsspec`` (``https``, ``s3``, ``gs``, ``hf``).

    Args:
        shards: tar files, one or several; ``{000..099}`` stands for many, and ``*`` for many local ones.
        buffer: see :class:`~lightning_mmgen.data.streams.Stream`.

    Raises:
        ValueError: no shard, or a protocol of another kind; ``pipe:`` would run a command.
        FileNotFoundError: no such local shard.
    """

    def __init__(self, shards: str | list[str], buffer: int = 1000) -> None:
        super().__init__(buffer)
        self.paths = expand(shards)
        for path in self.paths:
            protocol, there, _ = path.partition("://")
            if (there and protocol not in PROTOCOLS) or "::" in path or path.startswith("pipe:"):
                raise ValueError(f"{path[:80]}: a shard is a local file or a URL of {', '.join(PROTOCOLS)}")
            if not there and not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such shard")

    @property
    def shards(self) -> int:
        return len(self.paths)

    def name(self, shard: int, row: int) -> str:
        return f"{self.paths[shard].rpartition('/')[2]}:{row + 1}"

    def read(self, shard: int, start: int = 0) -> Iterator[Record | RowError]:
        import fsspec

        path = self.paths[shard]
        where = path.rpartition("/")[2]
        files, place = fsspec.core.url_to_fs(path)
        with files.open(place, "rb", cache_type="blockcache") as file:  # a row is read after the header behind it
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            with open_tar(file, path) as tar:
                for row, (members, whole) in enumerate(rows_of(tar, size)):
                    if row < start:
                        continue
                    try:
                        if not whole:
                            raise RecordError(CUT)
                        record: Record | RowError = read_row(tar, members)
                    except (RecordError, tarfile.TarError) as error:
                        record = RowError(where, row, str(error))
                    yield record

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.paths).encode()).hexdigest()


def expand(shards: str | Sequence[str]) -> list[str]:
    """Paths and URLs with ``{000..099}`` and, where they are local, ``*`` written out.

    Raises:
        ValueError: none is given.
        FileNotFoundError: a pattern that no file fits.
    """
    out: list[str] = []
    for text in [shards] if isinstance(shards, str) else shards:
        for path in _braces(text):
            if "://" in path or not set("*?[") & set(path):
                out.append(path)
                continue
            found = sorted(str(p) for p in Path(path).parent.glob(Path(path).name))
            if not found:
                raise FileNotFoundError(f"{path}: no such shard")
            out += found
    if not out:
        raise ValueError("no shards are given")
    return out


def _braces(text: str) -> list[str]:
    if (match := re.search(r"\{(\d+)\.\.(\d+)\}", text)) is None:
        return [text]
    low, high = match.groups()
    numbers = (f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1))
    return [path for number in numbers for path in _braces(text[: match.start()] + number + text[match.end() :])]


# -- writing ---------------------------------------------------------------------------------------------------------------------


def write_shards(records: Iterable[Record], folder: str | Path, rows: int = 1000, root: Path | None = None) -> list[Path]:
    """Write records as ``folder/shard-00000.tar``, ..., with their pictures: as PNG.

    Args:
        rows: of a shard.
        root: of the records' paths.

    Raises:
        RecordError: a picture cannot be read.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    records = iter(records)
    for shard in count():
        if (first := next(records, None)) is None:
            return paths
        paths.append(folder / f"shard-{shard:05d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            _write(tar, f"{shard * rows:09d}", first, root)
            for i, record in zip(range(1, rows), records):  # noqa: B905  # the range is asked first, and no record is lost
                _write(tar, f"{shard * rows + i:09d}", record, root)
    return paths


def _write(tar: tarfile.TarFile, key: str, record: Record, root: Path | None) -> None:
    held: dict[str, bytes] = {}

    def keep(picture: Picture, name: str) -> str:
        held[f"{name}.png"] = encode_png(picture, root)
        return f"{name}.png"

    row = replace(record, extra={}).map_pictures(keep).to_json()
    for extension, data in {"json": json.dumps(row, ensure_ascii=False).encode(), **held}.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))

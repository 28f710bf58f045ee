"""What every builder of records shares: a folder that a stopped build goes on from, one shard of n, counts of what was kept and why not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..files import whole_file
from ..prompt import Record

Item = TypeVar("Item")


class Shard(NamedTuple):
    """Part ``index`` of ``count`` of a build; the parts run side by side and share a folder."""

    index: int = 0  # type: ignore[assignment]
    count: int = 1  # type: ignore[assignment]

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"i/n"``, i from 0.

        Raises:
            ValueError: not of that form, or i is not below n.
        """
        try:
            shard = cls(*map(int, text.split("/")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"--shard {text!r} is not of the form i/n") from error
        if not 0 <= shard.index < shard.count:
            raise ValueError(f"--shard {text!r}: i counts from 0 and stays below n")
        return shard

    def name(self, stem: str, ending: str) -> str:
        """``stem.ending`` of the whole, ``stem-i-of-n.ending`` of a part."""
        return f"{stem}{ending}" if self.count == 1 else f"{stem}-{self.index:05d}-of-{self.count:05d}{ending}"


class Journal:
    """A build's progress, one line an item: its key, its records, its counts. A line that a kill tore is done again.

    Args:
        out: folder of the build; ``records.jsonl`` is written there when the last shard is done.
        settings: what the records depend on. A build goes on only with the same.
        shard: which part this process builds.

    Raises:
        ValueError: the folder holds a build with other settings.
    """

    def __init__(self, out: str | Path, settings: dict[str, Any], shard: Shard = Shard()) -> None:
        self.out, self.shard = Path(out), shard
        self.out.mkdir(parents=True, exist_ok=True)
        self.path = self.out / shard.name("journal", ".jsonl")
        self.counts: Counter[str] = Counter()
        self.notes: defaultdict[str, list[float]] = defaultdict(list)
        self.done: set[str] = set()
        head = json.dumps({"settings": settings}, sort_keys=True)
        if self.path.is_file():
            self._read(head)
        else:
            self.path.write_text(head + "\n", encoding="utf-8")

    def _read(self, head: str) -> None:
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                row = json.loads(line)
                if number == 0 and row != json.loads(head):
                    raise ValueError(f"{self.out}: was begun with other settings ({_differing(row, json.loads(head))}); give another --out")
                if number:
                    self._count(row["key"], row["counts"], row.get("notes", {}))
                end += len(line)
        os.truncate(self.path, end)
        if not end:
            self.path.write_text(head + "\n", encoding="utf-8")

    def todo(self, items: Sequence[Any], key: Callable[[Any], str]) -> list[Any]:
        """The items of this shard that are not done yet, in order."""
        return [item for item in items[self.shard.index :: self.shard.count] if key(item) not in self.done]

    def add(self, key: str, records: Iterable[Record], counts: dict[str, int], notes: Mapping[str, Sequence[float]] = {}) -> None:
        """Note an item as done, with the records that it gave (perhaps none) and its counts by name. Their pictures are files already.
        ``notes`` are numbers about the item, scores say, by name; the report has their quantiles."""
        row = {"key": key, "counts": counts, "notes": dict(notes), "records": [record.to_json() for record in records]}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._count(key, counts, notes)

    def _count(self, key: str, counts: Mapping[str, int], notes: Mapping[str, Sequence[float]]) -> None:
        self.done.add(key)
        self.counts.update(counts)
        for name, numbers in notes.items():
            self.notes[name] += numbers

    def finish(self) -> Path | None:
        """Write this shard's records and counts; when every shard's are there, ``records.jsonl`` and ``counts.json`` of the whole.

        Returns:
            The path of ``records.jsonl``, or None while other shards are not done.
        """
        mine = [self.shard.name(stem, ending) for stem, ending in (("records", ".jsonl"), ("counts", ".json"))]
        _write(self.out / mine[0], self._records())
        _write(self.out / mine[1], [json.dumps(self.counts, indent=1) + "\n"])
        shards = [Shard(i, self.shard.count) for i in range(self.shard.count)]
        if not all((self.out / s.name("counts", ".json")).is_file() for s in shards):
            return None
        if self.shard.count > 1:
            _write(self.out / "records.jsonl", (line for s in shards for line in _lines(self.out / s.name("records", ".jsonl"))))
            total: Counter[str] = Counter()
            for s in shards:
                total.update(json.loads((self.out / s.name("counts", ".json")).read_text()))
            _write(self.out / "counts.json", [json.dumps(total, indent=1) + "\n"])
        return self.out / "records.jsonl"

    def _records(self) -> Iterator[str]:
        with self.path.open(encoding="utf-8") as file:
            next(file)
            for line in file:
                yield from (json.dumps(row, ensure_ascii=False) + "\n" for row in json.loads(line)["records"])

    def conclude(self) -> str:
        """:meth:`finish`, and what to tell: the path of the records and the report."""
        return f"{self.finish() or 'the other shards are not done yet'}\n{self.report()}"

    def report(self) -> str:
        """The counts, a line each, and quantiles of what was noted."""
        width = max(map(len, self.counts), default=0)
        lines = [f"{name:<{width}}  {count:>8}" for name, count in self.counts.items()]
        return "\n".join(lines + [f"{name}: {_quantiles(numbers)}" for name, numbers in self.notes.items()])


def in_batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Items in their order, ``size`` together: the same batches in every run and shard, since what models say depends on the batch."""
    return [items[at : at + size] for at in range(0, len(items), size)]


def digest_of(lines: Iterable[str]) -> str:
    """A hash of lines of text, file names that are not UTF-8 among them."""
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _quantiles(numbers: Sequence[float]) -> str:
    at = [0.05, 0.25, 0.5, 0.75, 0.95]
    return ", ".join(f"{share:.0%} below {q:.3g}" for share, q in zip(at, np.quantile(numbers, at).tolist(), strict=True))


def check_apart(out: str, data: str) -> None:
    """Raises: ValueError: ``out`` lies in the folder ``data``."""
    if Path(data).is_dir() and Path(out).resolve().is_relative_to(Path(data).resolve()):
        raise ValueError(f"--out {out}: lies in {data}, where it would be taken for data")


def adopt(picture: Path, out: Path, name: str) -> str:
    """Make a picture part of the build: its path relative to ``out`` if it lies there, else a hard link (or a copy) ``pictures/name``."""
    if picture.resolve().is_relative_to(out.resolve()):
        return picture.resolve().relative_to(out.resolve()).as_posix()
    target = out / "pictures" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        try:
            os.link(picture.resolve(), target)
        except OSError:  # another file system
            shutil.copyfile(picture, part := target.with_name(f".{target.name}.part"))
            part.replace(target)
    return f"pictures/{name}"


def _write(path: Path, lines: Iterable[str]) -> None:
    with whole_file(path) as file:
        file.writelines(line.encode() for line in lines)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from file


def _differing(old: dict[str, Any], new: dict[str, Any]) -> str:
    a, b = old.get("settings", {}), new["settings"]
    return ", ".join(sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k)))

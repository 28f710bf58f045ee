"""Several sources as one, in fixed shares (Instruct-Imagen, Hu et al. 2024, Table 1)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from ..prompt import Picture, Record, RecordError
from .images import locate_file
from .sources import RowError, Source


class Mixture(Source):
    """Named sources in fixed shares. Which source and which of its rows stands at an index is a pure function of (seed, epoch, index).

    Every epoch holds the same number of records of each source. A source is walked in a random order, each of its rows once, before
    it starts over in another order; the walk goes on from epoch to epoch. A record's ``task`` is the name of its source.

    Args:
        sources: by name.
        ratios: the share of each, over 0; they sum to 1.
        length: records an epoch; by default as many as no source has to start over for within an epoch.
        seed: of the order.
        repeat: sources start over; else a source that has no rows left is an error.

    Raises:
        ValueError: a ratio without a source or a source without a ratio, ratios that are no shares, an empty source, one that the
            length leaves without a place, or one that has too few rows and may not start over.
    """

    def __init__(
        self, sources: Mapping[str, Source], ratios: Mapping[str, float], length: int | None = None, seed: int = 0, repeat: bool = True
    ) -> None:
        check_ratios(set(sources), ratios)
        if empty := [name for name, source in sources.items() if not len(source)]:
            raise ValueError(f"the source of {empty[0]} holds no rows")
        self.names = list(ratios)
        self.sources, self.ratios, self.seed, self.repeat = [sources[name] for name in self.names], dict(ratios), seed, repeat
        self.rows = [len(source) for source in self.sources]
        self.length = int(min(n / ratios[name] for n, name in zip(self.rows, self.names, strict=True)) + 1e-6) if length is None else length
        self.counts = apportion(list(ratios.values()), self.length)
        for name, count, rows in zip(self.names, self.counts, self.rows, strict=True):
            if not count:
                raise ValueError(f"an epoch of {self.length} records is too short for the ratio {ratios[name]:g} of {name}")
            if count > rows and not repeat:
                raise ValueError(f"an epoch of {self.length} records needs {count} of {name}, which has {rows} and does not repeat")
        self.root = Path("/")  # paths are made absolute here, since each source has a root of its own
        self._ends = list(accumulate(self.counts))

    def __len__(self) -> int:
        return self.length

    def locate(self, index: int, epoch: int = 0) -> tuple[int, int, int]:
        """What stands at ``index``: which source, which of its rows, and how often it has been walked before.

        Raises:
            ValueError: the source has no rows left and does not repeat.
        """
        place = shuffled(index, self.length, f"{self.seed}/{epoch}")
        k = int(np.searchsorted(self._ends, place, side="right"))
        walked, at = divmod(epoch * self.counts[k] + place - (self._ends[k] - self.counts[k]), self.rows[k])
        if walked and not self.repeat:
            raise ValueError(f"{self.names[k]} has no rows left in epoch {epoch}: all {self.rows[k]} were used, and it does not repeat")
        return k, shuffled(at, self.rows[k], f"{self.seed}/{self.names[k]}/{walked}"), walked

    def row(self, index: int, epoch: int = 0) -> int:
        k, row, _ = self.locate(index, epoch)
        return sum(self.rows[:k]) + row

    def name(self, index: int, epoch: int = 0) -> str:
        k, row, _ = self.locate(index, epoch)
        return f"{self.names[k]} row {row + 1}"

    def record(self, index: int, epoch: int = 0) -> Record:
        k, row, walked = self.locate(index, epoch)
        source, name = self.sources[k], self.names[k]
        record = source.record(row, walked)
        try:
            record = record.map_pictures(partial(_absolute, source.root or Path.cwd()))
        except RecordError as error:
            raise RowError(name, row, str(error)) from error
        return replace(record, task=name)

    def fingerprint(self) -> str:
        held = [(name, self.ratios[name], source.fingerprint()) for name, source in zip(self.names, self.sources, strict=True)]
        return hashlib.sha256(repr((held, self.length, self.seed)).encode()).hexdigest()


def check_ratios(sources: set[str], ratios: Mapping[str, float]) -> None:
    """Raises: ValueError: sources and ratios have not the same names, or the ratios are no shares of a whole."""
    if missing := sorted(set(ratios) - sources):
        raise ValueError(f"there are ratios but no sources for {', '.join(missing)}: give the sources, or ratios without these names")
    if missing := sorted(sources - set(ratios)):
        raise ValueError(f"there are sources but no ratios for {', '.join(missing)}")
    listed = ", ".join(f"{name} {ratio:g}" for name, ratio in ratios.items())
    if not ratios or not all(ratio > 0 for ratio in ratios.values()):
        raise ValueError(f"ratios must be over 0: {listed or 'there are none'}")
    if abs(sum(ratios.values()) - 1) > 1e-6:
        raise ValueError(f"ratios must sum to 1, not {sum(ratios.values()):g}: {listed}")


def apportion(shares: list[float], total: int) -> list[int]:
    """Whole numbers that sum to ``total``, by largest remainder; ``shares`` sum to 1."""
    exact = np.array(shares) * total
    counts = np.floor(exact + 1e-6).astype(int)
    for k in np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]:
        counts[k] += 1
    return [int(count) for count in counts]


def shuffled(index: int, length: int, key: str) -> int:
    """Where a random permutation of 0..length-1 takes ``index``, without holding the permutation: a Feistel network over the next power
    of 4, walked until it lands inside (Black & Rogaway 2002, section 3)."""
    half = max(((length - 1).bit_length() + 1) // 2, 1)
    while True:
        left, right = index >> half, index & ((1 << half) - 1)
        for turn in range(6):
            digest = hashlib.blake2b(f"{key}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & ((1 << half) - 1))
        index = left << half | right
        if index < length:
            return index


def _absolute(root: Path, picture: Picture, _: str) -> Picture:
    return str(locate_file(picture, root)) if isinstance(picture, str) else picture

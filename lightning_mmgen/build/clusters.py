"""``mmgen build clusters``: captioned pictures, each with its nearest neighbours as references (Instruct-Imagen, section 4)."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ..data.images import locate_file
from ..prompt import Record, RecordError, Reference, in_context
from .captions import read_lines
from .corpus import Corpus, Pair, open_corpus
from .embed import DOMAINS, Embedding, Vectors, embed
from .journal import Journal, Shard, adopt
from .neighbours import Neighbours

__all__ = ["DOMAINS", "Clustering", "Embedding", "build_clusters", "read_lines"]

QUERIES = 1024
"""Rows that are looked up together, and noted together as done."""


@dataclass(frozen=True)
class Clustering:
    """How clusters are chosen (the paper: 10 neighbours, size 5, of which smaller ones are dropped).

    Attributes:
        neighbours: nearest pictures to choose from.
        duplicate: a picture is dropped whose cosine with one before it in the cluster is higher. The paper does not state its limit.
        size: most pictures of a cluster, its target among them.
        min_size: smaller clusters are dropped; 4 are a target and the three pictures of its context.
        index: ``flat``, ``ivfpq``, or ``auto``; see :class:`~lightning_mmgen.build.neighbours.Neighbours`.

    Raises:
        ValueError: a number out of its range.
    """

    neighbours: int = 10
    duplicate: float = 0.96
    size: int = 5
    min_size: int = 4
    index: str = "auto"

    def __post_init__(self) -> None:
        if not 2 <= self.min_size <= self.size <= self.neighbours + 1:
            raise ValueError("needs 2 <= --min-size <= --size <= --neighbours + 1")


class Chooser:
    """Chooses what stays of a picture's neighbours.

    Args:
        settings: the rules.
        corpus: the rows.
        images: folder of the pictures.
        counts: neighbours that were dropped, by rule.
    """

    def __init__(self, settings: Clustering, corpus: Corpus, images: Path, counts: Counter[str]) -> None:
        self.settings, self.corpus, self.images, self.counts = settings, corpus, images, counts

    def choose(self, rows: Sequence[int], cosines: npt.NDArray[np.float32]) -> dict[int, Pair]:
        """The pairs of a cluster by row, the target first; nothing where its picture is gone.

        Args:
            rows: the target's, then its neighbours', nearest first.
            cosines: of each with each, [n, n].
        """
        kept: list[int] = []
        pairs: dict[int, Pair] = {}
        for place, row in enumerate(rows):
            if len(kept) == self.settings.size:
                break
            if kept and cosines[place, kept].max() > self.settings.duplicate:
                self.counts["neighbours near-duplicate"] += 1
            elif (pair := self._pair(row)) is None:
                self.counts["pictures gone"] += 1
                if not kept:
                    break
            elif pair.url and pair.url in {other.url for other in pairs.values()}:
                self.counts["neighbours of the same URL"] += 1
            else:
                kept.append(place)
                pairs[row] = pair
        return pairs

    def _pair(self, row: int) -> Pair | None:
        try:
            pair = self.corpus[row]
            locate_file(pair.image, self.images)
        except RecordError:
            return None
        return pair


def build_clusters(
    embedding: Embedding,
    clustering: Clustering,
    out: str,
    device: str = "cpu",
    workers: int = 0,
    shard: Shard = Shard(),
    engine: str = "local",
) -> str:
    """Embed this shard's pictures; when all are embedded, look up the neighbours of each and write a record for every cluster.

    Returns:
        A report: the path of the records, and counts by rule.

    Raises:
        FileNotFoundError: no such file, folder or model.
        ValueError: an unusable file or model, or ``out`` holds a build with other settings.
    """
    folder = Path(out) / "embeddings"
    mine, vectors, whole = embed(embedding, folder, device, workers, shard, engine)
    if not whole:
        return f"the other shards are not done yet\n{mine.report()}"
    with _alone(folder / "lock") as alone:
        if not alone:
            return f"another process is looking up the neighbours\n{mine.report()}"
        corpus = open_corpus(embedding.captions)
        journal = Journal(out, {**asdict(embedding), **asdict(clustering), "captions": corpus.fingerprint()})
        if "embeddings" not in journal.done:
            journal.add("embeddings", [], json.loads((folder / "counts.json").read_text()))
        _search(vectors, clustering, corpus, Path(embedding.images), journal)
        return f"{journal.finish()}\n{journal.report()}"


def _search(vectors: Vectors, settings: Clustering, corpus: Corpus, images: Path, journal: Journal) -> None:
    """Look up domain by domain; only one index is in memory at a time."""
    domains = vectors.domains()
    for domain in range(1, int(domains.max()) + 1):
        rows = np.flatnonzero(domains == domain)
        todo = journal.todo([(domain, start) for start in range(0, len(rows), QUERIES)], key=str)
        if not todo:
            continue
        neighbours = Neighbours(vectors.read(), rows, settings.index)
        for key in tqdm(todo, desc=f"domain {domain}", unit="block", disable=None):
            look_up(neighbours, rows[key[1] : key[1] + QUERIES], settings, corpus, images, journal, str(key))


def look_up(
    neighbours: Neighbours, rows: npt.NDArray[np.int64], settings: Clustering, corpus: Corpus, images: Path, journal: Journal, key: str
) -> None:
    """Note the clusters of some rows, as one item of the journal."""
    counts: Counter[str] = Counter()
    chooser = Chooser(settings, corpus, images, counts)
    records = []
    for row, near, cosines in neighbours.search(rows, settings.neighbours):
        pairs = chooser.choose([row, *near], cosines)
        small = len(pairs) < settings.min_size
        counts["clusters under --min-size" if small else "clusters"] += 1
        if not small:
            records.append(record(pairs, images, journal.out))
    journal.add(key, records, dict(counts))


def record(pairs: dict[int, Pair], images: Path, out: Path) -> Record:
    """A cluster, its target first, as a record; its pictures become part of the build."""

    def settled(row: int, pair: Pair) -> str:
        name = f"{row // 1000:05d}/{row:08d}{Path(pair.image).suffix}"
        return adopt(locate_file(pair.image, images), out, name)

    (row, target), *others = pairs.items()
    references = tuple(Reference(k, settled(*other), other[1].caption.rstrip(" ."), "neighbour") for k, other in enumerate(others, 1))
    return Record(
        in_context(references, target.caption), references, settled(row, target), target.caption, task="retrieval", id=f"{row:08d}"
    )


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether no other process holds this lock; it falls with the process."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True

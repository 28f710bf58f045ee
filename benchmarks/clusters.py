"""What the search stage of ``mmgen build clusters`` costs: rows per second and peak memory, on random clustered embeddings.

    python benchmarks/clusters.py [--rows 1000000] [--width 768] [--index auto] [--queries 20000]

Embeddings lie around random centres, two hundred to a centre, in one domain, in a file of the layout that the builder writes. From there on
it is the builder: an index of all rows, and for ``--queries`` of them neighbours, duplicates, records and the journal. Prints seconds of
the index, rows per second of the rest, the hours that all rows would take, the recall of the ten neighbours against all cosines, and the
peak of the memory that is not a mapped file, beside the size of the embeddings.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from lightning_mmgen.build.clusters import QUERIES, Clustering, look_up
from lightning_mmgen.build.corpus import open_corpus
from lightning_mmgen.build.journal import Journal
from lightning_mmgen.build.neighbours import BLOCK, Neighbours

NEAREST = 10
CHECKED = 200
"""Rows whose neighbours are held against all cosines."""


def resident() -> int:
    """Bytes of this process in memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak() -> Iterator[list[int]]:
    """The highest of ``resident`` meanwhile, sampled ten times a second."""
    most, stop = [resident()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            most[0] = max(most[0], resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


def embeddings(path: Path, rows: int, width: int) -> npt.NDArray[np.float16]:
    """Clustered vectors of length 1 in a file, mapped into memory, [rows, width]."""
    rng = np.random.default_rng(0)
    centres = np.memmap(path.with_suffix(".centres"), np.float16, "w+", shape=(max(rows // 200, 1), width))
    vectors = np.memmap(path, np.float16, "w+", shape=(rows, width))
    for start in range(0, len(centres), BLOCK):
        centres[start : start + BLOCK] = rng.normal(size=centres[start : start + BLOCK].shape)
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        block = centres[np.sort(rng.integers(0, len(centres), count))] + rng.normal(0, 0.7, (count, width))
        vectors[start : start + count] = block / np.linalg.norm(block, axis=1, keepdims=True)
    vectors.flush()
    return np.memmap(path, np.float16, "r", shape=(rows, width))


def captions(folder: Path, rows: int) -> Path:
    """A file of rows that share one picture."""
    PILImage.new("RGB", (8, 8)).save(folder / "one.png")
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(rows):
            file.write(json.dumps({"image": "one.png", "caption": f"picture {i}", "url": f"https://a.example/{i}"}) + "\n")
    return folder / "rows.jsonl"


def recall(vectors: npt.NDArray[np.float16], found: dict[int, list[int]]) -> float:
    """The share of the true nearest that was found."""
    rows = np.array(list(found))
    queries = vectors[rows].astype(np.float32)
    best: npt.NDArray[np.float32] = np.full((len(rows), 1), -2, np.float32)
    names: npt.NDArray[np.int64] = np.full((len(rows), 1), -1)
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK].astype(np.float32)
        cosines = np.concatenate([best, queries @ block.T], 1)
        known = np.concatenate([names, np.broadcast_to(np.arange(start, start + len(block)), (len(rows), len(block)))], 1)
        top = np.argpartition(-cosines, NEAREST, 1)[:, : NEAREST + 1]
        best, names = np.take_along_axis(cosines, top, 1), np.take_along_axis(known, top, 1)
    return float(np.mean([len(set(near) & set(row.tolist())) / NEAREST for near, row in zip(found.values(), names, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--index", choices=["auto", "flat", "ivfpq"], default="auto")
    parser.add_argument("--queries", type=int, default=20_000, help="rows to look up")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vectors, corpus = embeddings(folder / "vectors.f16", args.rows, args.width), open_corpus(str(captions(folder, args.rows)))
        settings, journal = Clustering(duplicate=0.9), Journal(folder / "out", {})
        asked = np.random.default_rng(1).permutation(args.rows)[: args.queries]
        before, start = resident(), time.perf_counter()
        with peak() as most:
            index = Neighbours(vectors, np.arange(args.rows), args.index)
            built = time.perf_counter() - start
            for at in range(0, len(asked), QUERIES):
                look_up(index, np.sort(asked[at : at + QUERIES]), settings, corpus, folder, journal, str(at))
            journal.finish()
            rate = len(asked) / (time.perf_counter() - start - built)
        kind, hours = "flat" if index.wider == 1 else "ivfpq", args.rows / rate / 3600
        print(f"{kind}, {args.rows} rows of {args.width}: index in {built:.1f} s; {rate:.0f} rows/s, {hours:.2f} h for all")
        found = {row: near for row, near, _ in index.search(asked[:CHECKED], NEAREST)}
        print(f"recall of {NEAREST}: {recall(vectors, found):.3f}; of {len(asked)} rows: {dict(journal.counts)}")
        used, size = (most[0] - before) / 1e6, vectors.nbytes / 1e6
        print(f"memory: {used:.0f} MB above {before / 1e6:.0f} MB; the embeddings have {size:.0f} MB on disk")


if __name__ == "__main__":
    main()

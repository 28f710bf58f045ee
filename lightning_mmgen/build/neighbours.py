"""Nearest neighbours by cosine among the rows of one domain, with FAISS (Douze et al. 2024, arXiv 2401.08281)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import faiss
except ImportError as error:
    raise ValueError("neighbours need FAISS: pip install 'lightning_mmgen[build]'") from error

BLOCK = 65536
"""Rows that are read into the index at once."""
PROBES = 64
TRAINING = 64
"""Rows a centroid that the index is trained on."""
LEAST = 39
"""Rows a centroid, below which FAISS warns."""
MOST_FLAT = 100_000
"""Rows up to which ``auto`` is exact: an exact look-up of all rows takes time with their square."""
LEAST_FOR_PQ = LEAST * 256
"""A product quantizer has 256 centroids."""
WIDER = 4
"""How many times as many rows a compressed index is asked for; their true cosines choose among them."""


class Neighbours:
    """An index of some rows. Memory holds the index and 8 bytes a row; the vectors stay on disk.

    Args:
        vectors: of all rows, of length 1, [n, d], mapped into memory.
        rows: numbers of those that count, [m].
        kind: ``flat``, exact, 2 d bytes a row; or ``ivfpq``, inverted lists of product-quantized rows (Jegou et al. 2011), about
            d / 8 bytes a row; or ``auto``, the first up to ``MOST_FLAT`` rows and the second beyond. Few rows are always flat.
    """

    def __init__(self, vectors: npt.NDArray[np.float16], rows: npt.NDArray[np.int64], kind: str = "auto") -> None:
        self.vectors, self.rows = vectors, rows
        kind = kind if kind != "auto" else "flat" if len(rows) <= MOST_FLAT else "ivfpq"
        self.wider = WIDER if kind == "ivfpq" and len(rows) >= LEAST_FOR_PQ else 1
        self.index = self._trained() if self.wider > 1 else self._flat()
        for start in range(0, len(rows), BLOCK):
            self.index.add(self.read(rows[start : start + BLOCK]))

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Vectors of rows, [k, d]."""
        return self.vectors[rows].astype(np.float32)

    def search(self, rows: npt.NDArray[np.int64], count: int) -> Iterator[tuple[int, list[int], npt.NDArray[np.float32]]]:
        """For each row its ``count`` nearest others, nearest first: the row, their numbers, and the cosines of all of them and the row
        itself, which comes first, [1 + count, 1 + count]."""
        _, found = self.index.search(self.read(rows), count * self.wider + 1)
        for row, places in zip(rows.tolist(), found, strict=True):
            near = self.rows[places[places >= 0]]
            near = np.concatenate([[row], near[near != row][: count * self.wider]])
            block = self.read(near)
            order = np.concatenate([[0], 1 + np.argsort(-(block[1:] @ block[0]), kind="stable")])[: count + 1]
            yield row, near[order[1:]].tolist(), block[order] @ block[order].T

    def _flat(self) -> Any:
        return faiss.IndexScalarQuantizer(self.vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)

    def _trained(self) -> Any:
        width = self.vectors.shape[1]
        lists = min(int(4 * math.sqrt(len(self.rows))), len(self.rows) // LEAST)  # as FAISS advises
        parts = next(m for m in range(max(width // 8, 1), 0, -1) if width % m == 0)
        index: Any = faiss.index_factory(width, f"IVF{lists},PQ{parts}", faiss.METRIC_INNER_PRODUCT)
        index.nprobe = min(PROBES, lists)
        index.pq.cp.max_points_per_centroid = TRAINING
        count = min(len(self.rows), TRAINING * max(lists, 256))
        index.train(self.read(np.sort(np.random.default_rng(0).choice(self.rows, count, replace=False))))
        return index

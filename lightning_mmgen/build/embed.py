"""CLIP embeddings of a corpus's good pictures and the domain of each (Instruct-Imagen, section 4), on one machine or on Ray."""

from __future__ import annotations

import logging
import pickle
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as PILImage
from PIL import ImageOps
from PIL.Image import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoConfig

from ..data.images import open_picture, pixels
from ..models.clip import Clip
from ..models.weights import locate
from ..prompt import RecordError
from .classifier import Classifier
from .corpus import open_corpus
from .journal import Journal, Shard

_KINDS = "photograph, painting, drawing, cartoon, 3D rendering, logo, diagram, screenshot"
DOMAINS = tuple(f"a {kind}" for kind in _KINDS.split(", "))


@dataclass(frozen=True)
class Embedding:
    """What the embeddings depend on.

    Attributes:
        images: folder of the pictures.
        captions: JSONL rows {image, caption, url?, score?}, or a parquet file of these columns.
        clip: hub name or folder of a CLIP.
        domains: texts, at most 255; a picture belongs to the one that its CLIP embedding is nearest to.
        min_score: least score; None drops nothing.
        quality: hub name or folder of an image classifier that scores; "" takes the scores of the rows.
        quality_label: its class whose probability is the score.
        batch_size: pictures that the models see together; rounding depends on it, so that it is the same in every shard.

    Raises:
        ValueError: a number of domains out of its range, or a classifier without a least score.
    """

    images: str
    captions: str
    clip: str = "openai/clip-vit-large-patch14"
    domains: Sequence[str] = DOMAINS
    min_score: float | None = None
    quality: str = ""
    quality_label: str = "good"
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not 1 <= len(self.domains) <= 255:
            raise ValueError(f"--domains: must be 1 to 255, not {len(self.domains)}")
        if self.quality and self.min_score is None:
            raise ValueError("--quality needs a --min-score")


class Batch(NamedTuple):
    """Rows from ``start`` on: the picture of each, or the rule that dropped it."""

    start: int
    rows: list[Image | str]


class Embedded(NamedTuple):
    """Rows from ``start`` on.

    Attributes:
        vectors: of length 1, [b, d], float16; 0 for dropped rows.
        domains: number of the domain, counted from 1, [b], uint8; 0 for dropped rows.
        counts: rows by rule.
    """

    start: int
    vectors: npt.NDArray[np.float16]
    domains: npt.NDArray[np.uint8]
    counts: Mapping[str, int]


class Vectors:
    """Embeddings and domains of all rows, in two files of fixed places, so that shards write side by side.

    Args:
        folder: holds ``vectors.f16`` and ``domains.u8``; they are made where they are missing.
        rows, width: their shape.
    """

    def __init__(self, folder: Path, rows: int, width: int) -> None:
        self.rows, self.width = rows, width
        self.paths = folder / "vectors.f16", folder / "domains.u8"
        for path, size in zip(self.paths, (2 * rows * width, rows), strict=True):
            with path.open("ab") as file:
                file.truncate(size)

    def write(self, embedded: Embedded) -> None:
        """Put rows in their places."""
        with self.paths[0].open("r+b") as file:
            file.seek(2 * self.width * embedded.start)
            file.write(embedded.vectors.tobytes())
        with self.paths[1].open("r+b") as file:
            file.seek(embedded.start)
            file.write(embedded.domains.tobytes())

    def read(self) -> npt.NDArray[np.float16]:
        """All embeddings, mapped into memory, [n, d]."""
        return np.memmap(self.paths[0], np.float16, "r", shape=(self.rows, self.width))

    def domains(self) -> npt.NDArray[np.uint8]:
        """All domains, mapped into memory, [n]."""
        return np.memmap(self.paths[1], np.uint8, "r", shape=(self.rows,))


class Batches(Dataset[Batch]):
    """Batches of pictures, read and checked by the rules that need no model.

    Args:
        settings: names the corpus and the rules.
        starts: first rows of the batches to read.
        side: pixels of CLIP's pictures; None keeps them whole, for a classifier.
    """

    def __init__(self, settings: Embedding, starts: Sequence[int], side: int | None) -> None:
        self.settings, self.starts, self.side = settings, starts, side
        self.corpus, self.root = open_corpus(settings.captions), Path(settings.images)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Batch:
        return self.read(self.starts[index])

    def read(self, start: int) -> Batch:
        """The batch that begins with a row."""
        end = min(start + self.settings.batch_size, len(self.corpus))
        return Batch(start, [self._read(row) for row in range(start, end)])

    def _read(self, row: int) -> Image | str:
        try:
            pair = self.corpus[row]
        except RecordError as error:
            tqdm.write(f"{self.settings.captions}: {error}", sys.stderr)
            return "bad row"
        if not pair.caption:
            return "no caption"
        if self.settings.min_score is not None and not self.settings.quality:
            if pair.score is None:
                return "no score"
            if not pair.score >= self.settings.min_score:  # NaN too
                return "under --min-score"
        try:
            image = open_picture(pair.image, self.root)
        except RecordError as error:
            tqdm.write(f"row {row + 1}: {error}", sys.stderr)
            return "unreadable"
        return image if self.side is None else fit(image, self.side)


def fit(image: Image, side: int) -> Image:
    """The square in the middle, resized."""
    return ImageOps.fit(image, (side, side), PILImage.Resampling.BICUBIC)


class Embedder:
    """The models: a classifier of quality where one is named, and CLIP.

    Args:
        settings: name them.
        device: where they run.
    """

    def __init__(self, settings: Embedding, device: str = "cpu") -> None:
        self.settings, self.device = settings, device
        self.quality = Classifier(settings.quality, settings.quality_label, device) if settings.quality else None
        self.clip = Clip(settings.clip).to(device)
        self.domains = self.clip.embed_texts(settings.domains)  # [domains, d]

    def __call__(self, batch: Batch) -> Embedded:
        rules = [row if isinstance(row, str) else "embedded" for row in batch.rows]
        images = {i: row for i, row in enumerate(batch.rows) if not isinstance(row, str)}
        if self.quality and self.settings.min_score is not None and images:
            for i, score in zip(list(images), self.quality(list(images.values())), strict=True):
                if score < self.settings.min_score:
                    del images[i]
                    rules[i] = "under --min-score"
        vectors = np.zeros((len(rules), self.clip.width), np.float16)
        domains = np.zeros(len(rules), np.uint8)
        if images:
            vectors[list(images)], domains[list(images)] = self.embed(list(images.values()))
        named = Counter(f"domain {self.settings.domains[d - 1]}" for d in domains.tolist() if d)
        return Embedded(batch.start, vectors, domains, Counter(rows=len(rules)) + Counter(rules) + named)

    def embed(self, images: Sequence[Image]) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
        """Vectors [b, d] and domains [b], from 1."""
        stacked = torch.stack([pixels(fit(image, self.clip.side)) for image in images]).to(self.device)  # [b, 3, side, side]
        vectors = self.clip.embed(stacked)
        nearest = (vectors @ self.domains.T).argmax(-1) + 1
        return vectors.half().cpu().numpy(), nearest.to(torch.uint8).cpu().numpy()


def shape(clip: str) -> tuple[int, int]:
    """Pixels of a CLIP's pictures, and width of its embeddings.

    Raises:
        ValueError: it is no CLIP.
    """
    config: Any = AutoConfig.from_pretrained(locate(clip))
    if config.model_type != "clip":
        raise ValueError(f"{clip}: is a {config.model_type}, not a CLIP")
    return config.vision_config.image_size, config.projection_dim


def embed(settings: Embedding, folder: Path, device: str, workers: int, shard: Shard, engine: str) -> tuple[Journal, Vectors, bool]:
    """Embed this shard's rows.

    Returns:
        The journal of the shard, the vectors, and whether all shards are done.

    Raises:
        FileNotFoundError: no such file, folder or model.
        ValueError: an unusable file or model, or ``folder`` holds embeddings of other settings.
    """
    if not Path(settings.images).is_dir():
        raise FileNotFoundError(f"{settings.images}: no such folder")
    corpus, (side, width) = open_corpus(settings.captions), shape(settings.clip)
    journal = Journal(folder, {**asdict(settings), "captions": corpus.fingerprint()}, shard)
    vectors = Vectors(folder, len(corpus), width)
    if todo := journal.todo(range(0, len(corpus), settings.batch_size), key=str):
        run = on_ray if engine == "ray" else local
        stream = run(settings, todo, None if settings.quality else side, device, workers)
        for embedded in tqdm(stream, total=len(todo), desc="embeddings", unit="batch", disable=None):
            vectors.write(embedded)
            journal.add(str(embedded.start), [], dict(embedded.counts))
    return journal, vectors, journal.finish() is not None


def local(settings: Embedding, starts: Sequence[int], side: int | None, device: str, workers: int) -> Iterator[Embedded]:
    """Embed batches here; ``workers`` processes read pictures."""
    embedder = Embedder(settings, device)
    loader = DataLoader(Batches(settings, starts, side), batch_size=None, num_workers=workers)
    return map(embedder, loader)


def on_ray(settings: Embedding, starts: Sequence[int], side: int | None, device: str, workers: int) -> Iterator[Embedded]:
    """Embed batches on Ray Data, in any order: ``workers`` actors read and embed, each with a GPU of its own where ``device`` is one.

    The cluster that ``RAY_ADDRESS`` names or that runs is used, else one is started on this machine. Its nodes see the same files.

    Raises:
        ValueError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise ValueError("--engine ray needs Ray: pip install 'lightning_mmgen[ray]'")
    import ray.data

    began, on_sigterm = not ray.is_initialized(), signal.getsignal(signal.SIGTERM)
    if began:
        ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = ray.data.from_items([{"start": start} for start in starts], override_num_blocks=min(len(starts), 10_000))
        done = rows.map_batches(
            Actor,
            fn_constructor_args=(settings_anywhere(settings), side, device),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=max(workers, 1)),
            num_gpus=int(device.startswith("cuda")),
        )
        for row in done.iter_rows():
            yield pickle.loads(row["embedded"])
    finally:
        if began:
            ray.shutdown()
            if signal.getsignal(signal.SIGTERM) is not on_sigterm:  # Ray leaves its own, which would end later runs of this process
                signal.signal(signal.SIGTERM, on_sigterm)


class Actor:
    """What reads and embeds on a node of Ray: {start: [1]} to {embedded: [1]}, pickled."""

    def __init__(self, settings: Embedding, side: int | None, device: str) -> None:
        self.batches, self.embedder = Batches(settings, (), side), Embedder(settings, device)

    def __call__(self, rows: dict[str, npt.NDArray[np.int64]]) -> dict[str, list[bytes]]:
        return {"embedded": [pickle.dumps(self.embedder(self.batches.read(int(start)))) for start in rows["start"]]}


def settings_anywhere(settings: Embedding) -> Embedding:
    """The settings with absolute paths: a process elsewhere has another working directory."""

    def absolute(path: str) -> str:
        path = locate(path)
        return str(Path(path).resolve()) if path and Path(path).exists() else path

    s = settings
    return replace(s, images=absolute(s.images), captions=absolute(s.captions), clip=absolute(s.clip), quality=absolute(s.quality))

"""``mmgen build attention``: where a diffusion model looks for each word of a picture's caption (Diffusion Instruction Tuning, Jin et al.
2025, appendix L)."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from ..batch import Condition
from ..data.attention import WordMaps, content_hash, write_index, write_shard
from ..data.images import pixels
from ..data.sources import Source, ToyboxSource, open_source
from ..inversion import Way, invert, sample_back
from ..models.attention import captured, grid_of
from ..prompt import Picture, Record, RecordError, without_markers
from .generators import Generator, Placed, open_generator
from .journal import Journal, Shard, in_batches

Mode = Literal["full", "fast"]


@dataclass(frozen=True)
class Targets:
    """What the targets depend on.

    Attributes:
        data: records with a picture and words: JSONL, parquet, a folder or name of ``datasets``; ``toybox`` or ``toybox/TASK``.
        model: a Stable Diffusion 1.x or SDXL, hub name or folder; a folder that ``mmgen export`` wrote; ``toybox``.
        mode: ``full``: DDIM inversion at guidance 1, then guided sampling back with null-text optimisation, whose maps are taken. ``fast``:
            the maps of the inversion itself.
        steps: of DDIM.
        inner_steps: of null-text optimisation at each of them.
        guidance: scale; the model's own (7.5 for Stable Diffusion) by default.
        rate: of the optimisation; 0.01 for Stable Diffusion, 0.1 for this package's models by default.
        layers: see :meth:`~lightning_mmgen.build.generators.Generator.layers`.
        size: side of the maps that are written; that of the finest layer by default, and maps of coarser ones are enlarged to it.
        side: of the pictures in pixels; the model's own by default.
        dtype: of the model's weights.
        count: the first so many rows; all by default.
        compare: the first so many rows are done in both modes, to tell how well they agree.
        batch_size: pictures together.
        shard_size: rows a shard; a stopped build loses at most one.
    """

    data: str
    model: str
    mode: Mode = "full"
    steps: int = 10
    inner_steps: int = 5
    guidance: float | None = None
    rate: float | None = None
    layers: str = ""
    size: int | None = None
    side: int | None = None
    dtype: str = "float32"
    count: int | None = None
    compare: int = 8
    batch_size: int = 4
    shard_size: int = 64

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"--mode must be full or fast, not {self.mode!r}")
        for name in ("steps", "inner_steps", "size", "side", "count", "batch_size", "shard_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {value}")


class Row(NamedTuple):
    """A picture and its caption, ready: its name, its content's hash, [3, h, w] in [-1, 1], and the caption's words with their tokens."""

    id: str
    image: str
    pixels: Tensor
    caption: str
    words: list[Placed]


class Looked(NamedTuple):
    """Maps of b pictures, [words, s, s] in [0, 1] each, by mode; how well the full mode's pictures return in dB, if it ran; the seconds
    that the mode asked for took."""

    maps: dict[Mode, list[Tensor]]
    psnr: list[float]
    seconds: float


class Maps:
    """Shares of attention that pixels give to words, summed over passes.

    Args:
        generator: whose UNet passes.
        layers: names of its layers.
        words: of each caption of a batch.
    """

    def __init__(self, generator: Generator, layers: Sequence[str], words: list[list[Placed]]) -> None:
        self.generator, self.layers, self.words = generator, layers, words
        flat = [(b, token, word) for word, (b, w) in enumerate((b, w) for b, row in enumerate(words) for w in row) for token in w.tokens]
        self.sample, self.token, self.word = torch.tensor(flat, device=generator.device).T
        self.total: Tensor | float = 0.0

    def predict(self, z: Tensor, timestep: int, condition: Condition) -> Tensor:
        """A pass of the UNet, whose maps are taken."""
        with captured(self.generator.unet, self.layers) as records:
            prediction = self.generator.predict(z, timestep, condition)
        grids = []
        for record in records.values():
            shares = record.columns(self.sample, self.token).mean(1)  # [tokens, pixels]
            grids.append(shares.view(-1, *grid_of(shares.shape[1], (z.shape[-2], z.shape[-1]))))
        finest = max(grid.shape[-1] for grid in grids)
        self.total = self.total + sum(resized(grid, finest) for grid in grids)
        return prediction

    def normalised(self, size: int | None) -> list[Tensor]:
        """The mean over a word's tokens, and over all that was summed, each word's from its least to its greatest as [0, 1]."""
        assert isinstance(self.total, Tensor)
        counts = [len(row) for row in self.words]
        maps = self.total.new_zeros(sum(counts), *self.total.shape[1:]).index_add(0, self.word, self.total)
        maps = maps if size is None else resized(maps, size)
        low, high = (edge(maps, (1, 2), keepdim=True) for edge in (torch.amin, torch.amax))
        return list(((maps - low) / (high - low).clamp(min=1e-9)).cpu().split(counts))  # type: ignore[no-untyped-call]


def resized(maps: Tensor, size: int) -> Tensor:
    """Maps [n, h, w] as [n, size, size]: bilinear, with antialiasing where they shrink."""
    return maps if maps.shape[-1] == size else interpolate(maps[None], (size, size), mode="bilinear", antialias=True)[0]


def look(generator: Generator, rows: Sequence[Row], settings: Targets, both: bool) -> Looked:
    """The maps of a batch.

    Args:
        both: in both modes; else those of the mode asked for. The full mode has the fast one's maps at no cost.
    """
    began = time.perf_counter()
    given, words = generator.read([row.caption for row in rows]), [row.words for row in rows]
    z_0 = generator.codec.encode(torch.stack([row.pixels for row in rows]).to(generator.device))
    layers, way = generator.layers(settings.layers, z_0.shape[-1]), Way.of(generator.scheduler, settings.steps)
    fast, full = Maps(generator, layers, words), Maps(generator, layers, words)
    pivots = invert(lambda z, t: fast.predict(z, t, given), z_0, way)
    maps: dict[Mode, list[Tensor]] = {"fast": fast.normalised(settings.size)}
    seconds, psnr = time.perf_counter() - began, list[float]()
    if settings.mode == "full" or both:
        psnr = _return(generator, full, given, pivots, way, settings)
        maps["full"] = full.normalised(settings.size)
    return Looked(maps, psnr, time.perf_counter() - began if settings.mode == "full" else seconds)


def _return(generator: Generator, maps: Maps, given: Condition, pivots: list[Tensor], way: Way, settings: Targets) -> list[float]:
    """Sample back from an inversion while maps are taken; PSNR of what returns against what the autoencoder alone makes, in dB."""
    b, one = len(pivots[0]), generator.empty()
    pooled = None if one.pooled is None else one.pooled.expand(b, -1)
    empty = one._replace(tokens=one.tokens.expand(b, -1, -1), mask=one.mask.expand(b, -1), pooled=pooled, spans=[[]] * b, lengths=None)
    returned = sample_back(
        lambda z, t: maps.predict(z, t, given),
        lambda z, t, tokens: generator.predict(z, t, empty._replace(tokens=tokens)),
        empty.tokens.float(),
        pivots,
        way,
        generator.guidance if settings.guidance is None else settings.guidance,
        settings.inner_steps,
        generator.rate if settings.rate is None else settings.rate,
    )
    error = (generator.codec.decode(returned.z_0) - generator.codec.decode(pivots[-1])).square().mean((1, 2, 3))
    return (10 * (4 / error.clamp(min=1e-10)).log10()).tolist()  # type: ignore[no-any-return]


def agreement(a: Tensor, b: Tensor) -> tuple[float, float]:
    """How well maps [n, s, s] agree with others, as a mean over words: Pearson's correlation, and intersection over union of what is over
    one half."""
    x, y = (maps.flatten(1) - maps.flatten(1).mean(1, keepdim=True) for maps in (a, b))
    correlation = torch.cosine_similarity(x, y)
    inside, joined = ((a > 0.5) & (b > 0.5)).sum((1, 2)), ((a > 0.5) | (b > 0.5)).sum((1, 2))
    return float(correlation.mean()), float((inside / joined.clamp(min=1)).mean())


def build_attention(settings: Targets, out: str, device: str = "cpu", shard: Shard = Shard()) -> str:
    """Write the attention targets of every row that has a picture and words.

    Returns:
        A report: the path of the index, counts, and quantiles of the seconds an image, of how well pictures return, and of how well the two
        modes agree.

    Raises:
        FileNotFoundError: no such file or model.
        ValueError: data of which two rows have one id, a model of another kind, or ``out`` holds a build with other settings.
    """
    source = open_data(settings)
    rows = range(min(len(source), settings.count or len(source)))
    unique_ids(source, rows)
    journal = Journal(Path(out) / "build", {**asdict(settings), "data": source.fingerprint()}, shard)
    if todo := journal.todo(in_batches(rows, settings.shard_size), key=lambda part: str(part[0])):
        generator = open_generator(settings.model, settings.dtype, device)
        for part in tqdm(todo, desc="attention", unit="shard", disable=None):
            counts, notes = Counter[str](), dict[str, list[float]]()
            found = dict(_targets(generator, source, part, settings, counts, notes))
            if found:
                write_shard(Path(out) / f"{part[0]:08d}.safetensors", found)
            journal.add(str(part[0]), [], counts, notes)
    if journal.finish() is None:
        return f"the other shards are not done yet\n{journal.report()}"
    return f"{write_index(Path(out), settings.size)}\n{journal.report()}"


def open_data(settings: Targets) -> Source:
    """The source that ``--data`` names."""
    if settings.data.split("/")[0] != "toybox":
        return open_source(settings.data)
    return ToyboxSource({settings.data.removeprefix("toybox").strip("/") or "caption": 1.0}, length=settings.count or 16384)


def unique_ids(source: Source, rows: Sequence[int]) -> None:
    """Raises: ValueError: two rows have one id."""
    first: dict[str, int] = {}
    for row in rows:
        try:
            id = source.record(row).id
        except RecordError:
            continue
        if id and first.setdefault(id, row) != row:
            raise ValueError(f"rows {first[id] + 1} and {row + 1} have one id, {id!r}; targets are found by it")


def _targets(
    generator: Generator, source: Source, part: Sequence[int], settings: Targets, counts: Counter[str], notes: dict[str, list[float]]
) -> Iterator[tuple[str, WordMaps]]:
    """The targets of a shard's rows, by id; and their counts and notes."""
    good = [row for number in part if (row := _read(generator, source, number, settings.side or generator.side, counts))]
    for batch in in_batches(good, settings.batch_size):
        both = part[0] + len(notes.get("seconds an image", [])) < settings.compare
        looked = look(generator, batch, settings, both)
        _note(notes, looked, len(batch))
        for row, maps in zip(batch, looked.maps[settings.mode], strict=True):
            if not maps.isfinite().all():
                tqdm.write(f"{row.id}: the model overflows, as it may with --dtype float16", sys.stderr)
                counts["not a number"] += 1
                continue
            counts["words"] += len(maps)
            yield row.id, WordMaps(row.image, [placed.word for placed in row.words], maps)


def _note(notes: dict[str, list[float]], looked: Looked, images: int) -> None:
    found: dict[str, list[float]] = {"seconds an image": [looked.seconds / images] * images, "PSNR of the return, dB": looked.psnr}
    if len(looked.maps) == 2:
        pairs = [agreement(a, b) for a, b in zip(looked.maps["fast"], looked.maps["full"], strict=True)]
        found["correlation of fast with full maps"], found["IoU of fast with full maps"] = ([*x] for x in zip(*pairs, strict=True))
    for name, numbers in found.items():
        if finite := list(filter(math.isfinite, numbers)):
            notes.setdefault(name, []).extend(finite)


def _read(generator: Generator, source: Source, number: int, side: int, counts: Counter[str]) -> Row | None:
    """A row, ready; None where it cannot be used, which is told and counted."""
    counts["rows"] += 1
    rule = "unreadable"
    try:
        record = source.record(number)
        picture, caption = picture_of(record), caption_of(record)
        image, shown = content_hash(picture, source.root), pixels(picture, side, source.root)
        rule = "too long"
        words = generator.words(caption)
        kept = [word for word in words if word.tokens]
        counts["words that the text encoder cut"] += len(words) - len(kept)
        rule = "without words"
        if not kept:
            raise RecordError("its caption has no words")
    except RecordError as error:
        tqdm.write(f"row {number + 1}: {error}", sys.stderr)
        counts[rule] += 1
        return None
    return Row(record.id or source.name(number), image, shown, caption, kept)


def picture_of(record: Record) -> Picture:
    """The picture that a record's words are about: its target; of a question the first that it shows.

    Raises:
        RecordError: a question without pictures.
    """
    if record.question is None and record.target is not None:
        return record.target
    if not record.references:
        raise RecordError("the question has no picture")
    return record.references[0].image


def caption_of(record: Record) -> str:
    """What a record says of the picture: its caption, or else a question's answer or the instruction, without markers."""
    return without_markers(record.caption or record.answer or record.prompt().bare())

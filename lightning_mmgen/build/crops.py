"""``mmgen build crops``: where the words of a caption lie in its picture, as records for training on crops (MUMU, section 4)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL.Image import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.images import Edges, open_picture
from ..prompt import MARKER, Box, Record, RecordError
from .boxes import area, guess, read_boxes
from .captions import Caption, Found, Scene, read_captions
from .detector import Detection, Detector
from .journal import Journal, Shard, adopt, in_batches
from .phrases import Parser, Phrase, is_person

HEADS = ("detector", "keypoints", "none")
COUNTS = (
    *("pictures", "pictures unreadable"),
    *("captions", "captions of unreadable pictures", "captions empty", "captions with a marker", "captions without phrases"),
    *("captions without a box", "phrases", "boxes found", "boxes beyond a singular", "boxes of an unclear word", "boxes without words"),
    *("boxes of another shape", "boxes without area", "boxes outside", "boxes too small", "boxes too large", "boxes kept"),
    *("heads", "records"),
)


@dataclass(frozen=True)
class Options:
    """What ``mmgen build crops`` is told.

    Attributes:
        images: folder of the pictures.
        out: folder of the build.
        captions: COCO JSON, JSONL rows {image, caption}, or a folder of texts; by default texts beside the pictures.
        boxes: boxes that exist; by default phrases are parsed and detected.
        format: of the boxes, ``coco``, ``grit`` or ``flickr30k``; guessed by default.
        detector: a GroundingDINO, name or folder.
        parser: a spaCy pipeline, name or folder.
        box_threshold, text_threshold: of the detector.
        min_area: least area of a box in square pixels (MUMU: 150 x 150).
        max_share: largest share of the picture that a box may take (MUMU: 75 %).
        heads: ``detector``, ``keypoints`` or ``none``; by default keypoints with COCO's boxes, else the detector.
        min_head_area: least area of a head in square pixels (the paper has none; a smaller one is a blur at any token budget).
        batch_size: pictures a batch.
        workers: processes that read pictures.
        device: where the detector runs.
        shard: ``i/n``.

    Raises:
        ValueError: heads from keypoints without COCO's boxes, captions beside those of the boxes, or a number or shard out of its range.
    """

    images: str
    out: str
    captions: str | None = None
    boxes: str | None = None
    format: str | None = None
    detector: str = "IDEA-Research/grounding-dino-base"
    parser: str = "en_core_web_sm"
    box_threshold: float = 0.35
    text_threshold: float = 0.25
    min_area: float = 22500
    max_share: float = 0.75
    heads: str | None = None
    min_head_area: float = 1024
    batch_size: int = 8
    workers: int = 0
    device: str = "cpu"
    shard: str = "0/1"

    def __post_init__(self) -> None:
        Shard.parse(self.shard)
        if self.heads == "keypoints" and (self.boxes is None or self.box_format != "coco"):
            raise ValueError("--heads keypoints needs --boxes of COCO")
        if self.captions is not None and self.box_format in ("grit", "flickr30k"):
            raise ValueError(f"--captions: boxes of {self.box_format} have captions of their own")
        if self.batch_size < 1 or self.workers < 0:
            raise ValueError(f"--batch-size {self.batch_size} must be 1 or more, --workers {self.workers} 0 or more")
        if self.min_area < 0 or self.min_head_area < 0 or not 0 < self.max_share <= 1:
            raise ValueError("--min-area and --min-head-area must be 0 or more, --max-share above 0 and at most 1")

    @property
    def box_format(self) -> str | None:
        """Format of the boxes, None without."""
        return None if self.boxes is None else self.format or guess(Path(self.boxes))

    @property
    def heads_from(self) -> str:
        """One of ``HEADS``."""
        return self.heads or ("keypoints" if self.box_format == "coco" else "detector")

    def settings(self) -> dict[str, object]:
        """What the records depend on, apart from pictures, captions and boxes."""
        elsewhere = ("images", "out", "captions", "boxes", "format", "workers", "device", "shard")
        return {**{k: v for k, v in asdict(self).items() if k not in elsewhere}, "heads": self.heads_from}


def build(options: Options) -> str:
    """Write records of the captions that have boxes; a stopped build goes on. Batches are the same in every run and shard, so that the
    detector sees the same.

    Returns:
        The counts and the path of the records, for the terminal.

    Raises:
        FileNotFoundError, ValueError: an input is missing or of another form, or the folder holds a build with other settings.
    """
    if not Path(options.images).is_dir():
        raise FileNotFoundError(f"{options.images}: no such folder")
    if options.boxes is not None:
        scenes = read_boxes(options.boxes, options.box_format, options.captions)
    else:
        scenes = read_captions(options.captions, options.images)
    digest = hashlib.sha256()
    for scene in scenes:
        digest.update(repr(scene).encode())
    journal = Journal(options.out, {**options.settings(), "captions and boxes": digest.hexdigest()}, Shard.parse(options.shard))
    todo = journal.todo(in_batches(scenes, options.batch_size), key=_key)
    loader = DataLoader(Pictures(todo, options.images), batch_size=None, num_workers=options.workers, collate_fn=list)
    extract = Extractor(options)
    for batch, images in zip(todo, tqdm(loader, desc="crops", unit="batch", disable=None), strict=True):
        records, counts = extract(batch, images)
        journal.add(_key(batch), records, counts)
    return journal.conclude()


def _key(batch: Sequence[Scene]) -> str:
    return batch[0].image


class Pictures(Dataset[list["Image | None"]]):
    """The upright pictures of each batch, None for one that cannot be read."""

    def __init__(self, batches: Sequence[Sequence[Scene]], folder: str) -> None:
        self.batches, self.folder = batches, Path(folder)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[Image | None]:
        return [self._open(scene.image) for scene in self.batches[index]]

    def _open(self, image: str) -> Image | None:
        try:
            return open_picture(image, self.folder)
        except RecordError:
            return None


class Row(NamedTuple):
    """A caption that may become a record: its name, its picture's path, its picture, and the units of its boxes."""

    id: str
    caption: Caption
    path: str
    image: Image
    frame: tuple[float, float]


class Extractor:
    """From a batch of captioned pictures to its records. Detector and parser are loaded when they are first needed."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @cached_property
    def detector(self) -> Detector:
        """Finds phrases, and heads."""
        options = self.options
        return Detector(options.detector, options.box_threshold, options.text_threshold, options.device)

    @cached_property
    def parser(self) -> Parser:
        """Finds the phrases of a caption."""
        return Parser(self.options.parser)

    def __call__(self, batch: Sequence[Scene], images: Sequence[Image | None]) -> tuple[list[Record], dict[str, int]]:
        """Returns: the records, and how many of everything there was (``COUNTS``)."""
        counts = dict.fromkeys(COUNTS, 0)
        rows = usable(batch, images, counts)
        found = [in_pixels(row, counts) for row in rows] if self.options.boxes is not None else self.detect(rows, counts)
        kept = [self.keep(some, row.image.size, counts) for row, some in zip(rows, found, strict=True)]
        if self.options.heads_from == "detector":
            kept = self.find_heads(rows, kept)
        records = []
        for row, some in zip(rows, kept, strict=True):
            boxes = self.boxes(some, row.image.size)
            counts["boxes kept"] += len(some)
            counts["heads"] += len(boxes) - len(some)
            counts["records" if boxes else "captions without a box"] += 1
            if boxes:
                target = adopt(Path(self.options.images) / row.path, Path(self.options.out), row.path)
                records.append(Record(row.caption.text, target=target, caption=row.caption.text, task="crops", boxes=boxes, id=row.id))
        return records, counts

    def detect(self, rows: Sequence[Row], counts: dict[str, int]) -> list[list[Found]]:
        """Parse the captions and find their phrases. A phrase that occurs several times is asked once, and its boxes are dealt out to its
        places in turn, best first."""
        phrases = list(self.parser(row.caption.text for row in rows))
        counts["phrases"] += sum(map(len, phrases))
        counts["captions without phrases"] += sum(not some for some in phrases)
        asked = [list(dict.fromkeys(p.text.lower() for p in some)) for some in phrases]
        detections = self._ask([row.image for row in rows], asked)
        found = [deal(*each) for each in zip(phrases, asked, detections, strict=True)]
        counts["boxes found"] += sum(map(len, found))
        return found

    def keep(self, found: Sequence[Found], size: tuple[int, int], counts: dict[str, int]) -> list[Found]:
        """The boxes inside the picture and the limits, clipped, in the order of the caption and best first; counts those dropped."""
        kept = []
        for some in found:
            box = clip(some.box, size)
            if fault := self.fault(some.box, box, size):
                counts[fault] += 1
            else:
                kept.append(some._replace(box=box))
        return sorted(kept, key=lambda f: (f.start, -f.score))

    def fault(self, box: Edges, clipped: Edges, size: tuple[int, int]) -> str | None:
        """Why a box is dropped: by which count of ``COUNTS``."""
        if not area(box) > 0:  # NaN too
            return "boxes without area"
        if not area(clipped):
            return "boxes outside"
        if area(clipped) < self.options.min_area:
            return "boxes too small"
        return "boxes too large" if area(clipped) > self.options.max_share * size[0] * size[1] else None

    def find_heads(self, rows: Sequence[Row], kept: Sequence[Sequence[Found]]) -> list[list[Found]]:
        """Look for a head in the crop of each person; the best box counts."""
        persons = [(row.image, found.box) for row, some in zip(rows, kept, strict=True) for found in some if found.person]
        crops = [(math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])) for _, box in persons]
        images = [image.crop(crop) for (image, _), crop in zip(persons, crops, strict=True)]
        heads = iter(zip(crops, self._ask(images, [["head"]] * len(images)), strict=True))
        return [[f._replace(head=best_head(*next(heads))) if f.person else f for f in some] for some in kept]

    def boxes(self, found: Sequence[Found], size: tuple[int, int]) -> tuple[Box, ...]:
        """A record's boxes, a person's head behind the person."""
        out = []
        for some in found:
            out.append(Box(some.phrase, *some.box, kind="person" if some.person else "", start=some.start))
            head = clip(some.head, size) if some.head and self.options.heads_from != "none" else None
            if head and area(head) > 0 and area(head) >= self.options.min_head_area:
                out.append(Box(some.phrase, *head, kind="head", start=some.start))
        return tuple(out)

    def _ask(self, images: list[Image], phrases: list[list[str]]) -> list[list[Detection]]:
        """The detector, ``batch_size`` images at once."""
        size = self.options.batch_size
        batches = zip(in_batches(images, size), in_batches(phrases, size), strict=True)
        return [found for some, asked in batches for found in self.detector.detect(some, asked)]


def usable(batch: Sequence[Scene], images: Sequence[Image | None], counts: dict[str, int]) -> list[Row]:
    """The captions that have words and a picture; counts the others."""
    rows = []
    for scene, image in zip(batch, images, strict=True):
        counts["pictures"] += 1
        counts["pictures unreadable"] += image is None
        name = str(PurePosixPath(scene.image).with_suffix(""))
        for number, caption in enumerate(scene.captions):
            counts["captions"] += 1
            if image is None:
                counts["captions of unreadable pictures"] += 1
            elif not caption.text.strip():
                counts["captions empty"] += 1
            elif MARKER.search(caption.text):
                counts["captions with a marker"] += 1
            else:
                rows.append(Row(name if len(scene.captions) == 1 else f"{name}-{number}", caption, scene.image, image, scene.frame))
    return rows


def in_pixels(row: Row, counts: dict[str, int]) -> list[Found]:
    """The boxes that a caption came with, in pixels of the upright picture; none where the picture is not the annotated one's shape (it
    may be smaller or larger)."""
    found = row.caption.found or ()
    counts["boxes found"] += len(found) + sum(row.caption.dropped.values())
    counts["phrases"] += len({f.start for f in found})
    for rule, number in row.caption.dropped.items():
        counts[rule] += number
    (width, height), (w, h) = row.image.size, row.frame
    if (w, h) != (1.0, 1.0) and not abs(width * h - height * w) <= 0.02 * width * h:
        counts["boxes of another shape"] += len(found)
        return []
    x, y = width / w, height / h
    return [f._replace(box=_scaled(f.box, x, y), head=f.head and _scaled(f.head, x, y)) for f in found]


def deal(phrases: Sequence[Phrase], asked: Sequence[str], detections: Sequence[Detection]) -> list[Found]:
    """Detections of the words asked, best first, as boxes of the phrases in turn."""
    found = []
    for index, words in enumerate(asked):
        places = [p for p in phrases if p.text.lower() == words]
        for turn, d in enumerate(d for d in detections if d.phrase == index):
            place = places[turn % len(places)]
            found.append(Found(place.text, place.start, (d.left, d.top, d.right, d.bottom), d.score, is_person(place.text)))
    return found


def best_head(crop: tuple[int, int, int, int], detections: Sequence[Detection]) -> Edges | None:
    """The best detection of a crop, in pixels of the picture; inside the crop."""
    if not detections:
        return None
    left, top, right, bottom = crop
    d = detections[0]
    box = clip((d.left, d.top, d.right, d.bottom), (right - left, bottom - top))
    return box[0] + left, box[1] + top, box[2] + left, box[3] + top


def clip(box: Edges, size: tuple[int, int]) -> Edges:
    """The part of a box inside a picture of a size, to a hundredth of a pixel; without area where there is none."""
    (left, top, right, bottom), (width, height) = box, size
    return (
        round(min(max(left, 0.0), width), 2),
        round(min(max(top, 0.0), height), 2),
        round(min(max(right, 0.0), width), 2),
        round(min(max(bottom, 0.0), height), 2),
    )


def _scaled(box: Edges, x: float, y: float) -> Edges:
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y

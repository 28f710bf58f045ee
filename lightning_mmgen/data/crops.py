"""MUMU's prompts, made at train time: crops of the target before the words that they depict (Berman & Peysakhovich 2024, sections 4, 5)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageOps
from PIL.Image import Image

from ..models.encoder import Encoder
from ..prompt import CONTROLS, Box, Record, RecordError, Reference
from .controls import makers
from .datamodule import MultimodalDataModule
from .images import open_picture, square_around
from .recipe import Recipe
from .sources import Source
from .streams import Stream

AUGMENTATIONS = ("crop", "flip", "noise", "grey")
"""MUMU's."""


@dataclass(frozen=True)
class Cropping:
    """How crops enter a prompt; the defaults are the paper's stage 1.

    Args:
        crops_per_prompt: at most so many, drawn at random among the phrases that have boxes.
        people_first: people before anything else (stage 2 has one crop, of a person).
        head_share: of crops of people whose head is known, the share that becomes the head.
        augmented_share: of all crops, the share that :func:`augment` changes.
        augmentations: its kinds; ``light`` is ours, beside the paper's four.
        control_share: of all prompts, the share with a picture of the whole target's layout.
        controls: its kinds, each as likely as the others: ``edge``, ``depth``, ``sketch``.
        control_text: how the prompt speaks of it; the paper does not say.
        segmented: cut objects out of their background where a box has a mask (the paper's open question 2).
    """

    crops_per_prompt: int = 3
    people_first: bool = False
    head_share: float = 0.7
    augmented_share: float = 0.2
    augmentations: tuple[str, ...] = AUGMENTATIONS
    control_share: float = 0.3
    controls: tuple[str, ...] = CONTROLS
    control_text: str = "{instruction}, in the layout of the {marker} {kind}"
    segmented: bool = False

    def __post_init__(self) -> None:
        for name in ("head_share", "augmented_share", "control_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if self.crops_per_prompt < 0:
            raise ValueError(f"crops_per_prompt must be 0 or more, not {self.crops_per_prompt}")
        for name, known in (("controls", CONTROLS), ("augmentations", (*AUGMENTATIONS, "light"))):
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise ValueError(f"{name} has {unknown[0]!r}; there are {', '.join(known)}")
        if self.augmented_share and not self.augmentations:
            raise ValueError("augmented_share must be 0 where there are no augmentations")


class CropRecipe(Recipe):
    """A record with boxes and without references becomes a prompt with crops. Other records stay as they are.

    Args:
        cropping: which crops, how often.
        depth_model: makes the depth pictures that records lack; see :func:`~lightning_mmgen.data.controls.makers`.
    """

    def __init__(
        self,
        reference_size: int,
        target_size: int,
        encoder: Encoder | None = None,
        cropping: Cropping = Cropping(),
        depth_model: str | None = None,
    ) -> None:
        super().__init__(reference_size, target_size, encoder)
        self.cropping = cropping
        self.makers = makers(cropping.controls, depth_model) if cropping.control_share else {}

    def compose(self, record: Record, root: Path | None, rng: np.random.Generator) -> Record:
        """Raises: RecordError: the target cannot be read, or has no control picture of any of the kinds."""
        if record.references or record.target is None:
            return record
        target, record = self.square(open_picture(record.target, root), record, root)
        text, references = record.instruction, list[Reference]()
        for k, (at, box) in reversed(list(enumerate(self.choose(record, rng), 1))):  # from the end, so that places before stay
            text = f"{text[:at]}[ref#{k}] {text[at:]}"
            picture = self.cut(target, box, root)
            if rng.random() < self.cropping.augmented_share:
                picture = augment(picture, rng, self.cropping.augmentations)
            references.insert(0, Reference(k, picture, box.phrase, "crop"))
        if rng.random() < self.cropping.control_share:
            kind, picture = self.control(record, target, root, rng)
            k = len(references) + 1
            text = self.cropping.control_text.format(instruction=text.rstrip(" ."), marker=f"[ref#{k}]", kind=kind)
            references.append(Reference(k, picture, kind, kind))
        return replace(record, instruction=text, references=tuple(references), target=target)

    def square(self, target: Image, record: Record, root: Path | None) -> tuple[Image, Record]:
        """The square of the target that is to be drawn, in the middle of its boxes as far as the picture goes, and the record with boxes,
        their masks and control pictures of that square. A box of which less than half is left has no place in the prompt any more.

        Raises:
            RecordError: a box lies outside the target.
        """
        for box in record.boxes:
            if not _share_inside(box, (0, 0, *target.size)):
                raise RecordError(f"the box of {box.phrase!r} lies outside the target of {target.width} x {target.height} pixels")
        left, top, right, bottom = window = square_around(target.size, [b[1:5] for b in record.boxes])
        if (right - left, bottom - top) == target.size:
            return target, record
        boxes = tuple(_shifted(b, window, root) for b in record.boxes if _share_inside(b, window) >= 0.5)
        controls = {kind: _cut_like(open_picture(p, root), target.size, window) for kind, p in record.controls.items()}
        return target.crop(window), replace(record, boxes=boxes, controls=controls)

    def choose(self, record: Record, rng: np.random.Generator) -> list[tuple[int, Box]]:
        """The boxes to cut and where their words begin in the instruction, from left to right: one box a phrase, at most
        ``crops_per_prompt``, the head in place of some people."""
        phrases: dict[int, list[Box]] = {}
        for box in record.boxes:
            if (at := place_of(box, record)) is not None:
                phrases.setdefault(at, []).append(box)
        order = [int(i) for i in rng.permutation(sorted(phrases))]
        if self.cropping.people_first:
            order.sort(key=lambda at: not any(box.kind == "person" for box in phrases[at]))
        return [(at, self.one_of(phrases[at], rng)) for at in sorted(order[: self.cropping.crops_per_prompt])]

    def one_of(self, boxes: list[Box], rng: np.random.Generator) -> Box:
        """One of a phrase's boxes, or the head of a person among them."""
        whole = [b for b in boxes if b.kind != "head"] or boxes
        box = whole[int(rng.integers(len(whole)))]
        heads = [b for b in boxes if b.kind == "head" and _inside(b, box)]
        to_head = rng.random() < self.cropping.head_share
        return heads[0] if heads and box.kind == "person" and to_head else box

    def cut(self, target: Image, box: Box, root: Path | None) -> Image:
        """A box of the target, its edges rounded outwards and kept inside; black around the object where its mask is used."""
        edges = int(box.left), int(box.top), int(np.ceil(box.right)), int(np.ceil(box.bottom))
        left, top, right, bottom = (min(max(e, 0), limit) for e, limit in zip(edges, target.size * 2, strict=True))
        if self.cropping.segmented and box.mask is not None:
            mask = open_picture(box.mask, root).convert("L")
            target = PILImage.composite(target, PILImage.new("RGB", target.size), mask)
        return target.crop((left, top, right, bottom))

    def control(self, record: Record, target: Image, root: Path | None, rng: np.random.Generator) -> tuple[str, Image]:
        """One kind of control picture and the picture: the record's own, or made here."""
        kinds = [k for k in self.cropping.controls if k in record.controls or k in self.makers]
        if not kinds:
            raise RecordError(f"no control picture of the kinds {', '.join(self.cropping.controls)}, and nothing here that makes one")
        kind = str(rng.choice(kinds))
        if kind in record.controls:
            return kind, open_picture(record.controls[kind], root)
        return kind, self.makers[kind](target)


def place_of(box: Box, record: Record) -> int | None:
    """Where the box's phrase begins in the instruction: its occurrence there of the same number as in the caption; None if it has none."""
    words = re.compile(rf"(?<!\w){re.escape(box.phrase)}(?!\w)", re.IGNORECASE)
    before = 0 if box.start is None else len(words.findall((record.caption or record.instruction)[: box.start]))
    found = [m.start() for m in words.finditer(record.instruction)] if box.phrase else []
    return found[before] if before < len(found) else None


Window = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels of a picture."""


def _share_inside(box: Box, window: Window) -> float:
    """How much of the box's area lies in the window."""
    width, height = min(box.right, window[2]) - max(box.left, window[0]), min(box.bottom, window[3]) - max(box.top, window[1])
    return max(width, 0) * max(height, 0) / ((box.right - box.left) * (box.bottom - box.top))


def _shifted(box: Box, window: Window, root: Path | None) -> Box:
    """The box in pixels of the window, with its mask."""
    left, top, *_ = window
    mask = None if box.mask is None else open_picture(box.mask, root).crop(window)
    return box._replace(left=box.left - left, top=box.top - top, right=box.right - left, bottom=box.bottom - top, mask=mask)


def _cut_like(picture: Image, size: tuple[int, int], window: Window) -> Image:
    """The window of a picture that shows a target of this size, at a resolution of its own."""
    x, y = picture.width / size[0], picture.height / size[1]
    return picture.crop((round(window[0] * x), round(window[1] * y), round(window[2] * x), round(window[3] * y)))


def _inside(head: Box, person: Box) -> bool:
    x, y = (head.left + head.right) / 2, (head.top + head.bottom) / 2
    return person.left <= x <= person.right and person.top <= y <= person.bottom


def augment(
    picture: Image, rng: np.random.Generator, kinds: Sequence[str] = AUGMENTATIONS, smallest: float = 0.7, noise: float = 0.1
) -> Image:
    """Random ``crop``, ``flip``, Gaussian ``noise``, ``grey`` (MUMU, section 5), ``light`` (ours, :func:`relit`): each of the kinds with an
    even chance, at least one of them. Neither the chances nor the strengths are in the paper.

    Args:
        kinds: which of them there are.
        smallest: of the crop, the least share of each side.
        noise: its largest standard deviation, over the range of a pixel.
    """
    draw = rng.random(len(kinds)) < 0.5
    if not draw.any():
        draw = np.arange(len(kinds)) == rng.integers(len(kinds))
    drawn = {kind for kind, on in zip(kinds, draw, strict=True) if on}
    if "crop" in drawn:
        w, h = (max(int(side * rng.uniform(smallest, 1)), 1) for side in picture.size)
        left, top = (int(rng.integers(whole - part + 1)) for whole, part in zip(picture.size, (w, h), strict=True))
        picture = picture.crop((left, top, left + w, top + h))
    if "flip" in drawn:
        picture = ImageOps.mirror(picture)
    if "light" in drawn:
        picture = relit(picture, rng)
    if "noise" in drawn:
        pixels = np.asarray(picture, np.float64)
        picture = _picture(pixels + rng.normal(0, 255 * rng.uniform(0, noise), pixels.shape))
    return picture.convert("L").convert("RGB") if "grey" in drawn else picture


def relit(picture: Image, rng: np.random.Generator, darkest: float = 0.5, brightest: float = 1.25, haze: float = 0.5) -> Image:
    """Under another light: a gain that changes along one direction from one number between ``darkest`` and ``brightest`` to another, and
    then, for one picture in two, up to a share ``haze`` of white."""
    pixels, angle = np.asarray(picture, np.float64), rng.uniform(0, 2 * np.pi)
    y, x = (np.arange(side) / max(side - 1, 1) - 0.5 for side in pixels.shape[:2])
    across = 0.5 + (np.cos(angle) * x + np.sin(angle) * y[:, None]) / (abs(np.cos(angle)) + abs(np.sin(angle)))  # 0 to 1
    first, last = rng.uniform(darkest, brightest, 2)
    veil = rng.uniform(0, haze) if rng.random() < 0.5 else 0.0
    return _picture(pixels * (first + (last - first) * across)[..., None] * (1 - veil) + 255 * veil)


def _picture(pixels: NDArray[np.float64]) -> Image:
    return PILImage.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


class Repeated(Source):
    """A source in which some rows come more often: after every row once, others are drawn anew each epoch.

    Args:
        source: the rows.
        often: those that come more often.
        weight: how often in an epoch, on the mean; 1 or more.
        seed: of the draws.
    """

    def __init__(self, source: Source, often: list[int], weight: float, seed: int) -> None:
        if weight < 1:
            raise ValueError(f"a row cannot come less than once an epoch, but {weight} times")
        self.source, self.often, self.weight, self.seed, self.root = source, often, weight, seed, source.root
        self.more = round((weight - 1) * len(often))

    def __len__(self) -> int:
        return len(self.source) + self.more

    def row(self, index: int, epoch: int = 0) -> int:
        """Which row of the source stands at ``index``."""
        if (extra := index - len(self.source)) < 0:
            return index
        return self.often[int(np.random.default_rng((self.seed, epoch, extra)).integers(len(self.often)))]

    def record(self, index: int, epoch: int = 0) -> Record:
        return self.source.record(self.row(index, epoch), epoch)

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()} x {self.weight} of {len(self.often)}"


class CropDataModule(MultimodalDataModule):
    """Captioned pictures with boxes (``mmgen build crops``) as prompts with crops in them. The held-out set is neither augmented nor
    has it control pictures.

    Args:
        train, held_out: sources, or paths of them; ``toybox`` is the embedded world.
        crops_per_prompt, people_first, head_share, augmented_share, augmentations, control_share, controls, segmented: see
            :class:`Cropping`.
        depth_model: hub name or folder of a depth model; it makes the depth pictures that records lack, on the CPU of a loader process.
        person_weight: how often a picture of people is drawn in an epoch; the paper's bias towards them, of unknown size.
        settings: of :class:`~lightning_mmgen.data.datamodule.MultimodalDataModule`.
    """

    squares = True
    toybox: ClassVar = {"tasks": {"crops": 1.0}, "controls": True}
    toybox_held_out: ClassVar = {"tasks": {"crops": 1.0}, "length": 256}

    def __init__(
        self,
        train: Source | Stream | str,
        held_out: Source | str | None = None,
        crops_per_prompt: int = 3,
        people_first: bool = False,
        head_share: float = 0.7,
        augmented_share: float = 0.2,
        augmentations: tuple[str, ...] = AUGMENTATIONS,
        control_share: float = 0.3,
        controls: tuple[str, ...] = CONTROLS,
        segmented: bool = False,
        depth_model: str | None = None,
        person_weight: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(train, held_out, **settings)
        self.cropping = Cropping(
            crops_per_prompt, people_first, head_share, augmented_share, augmentations, control_share, controls, segmented=segmented
        )
        self.depth_model, self.person_weight = depth_model, person_weight
        if person_weight != 1:
            if isinstance(self.train, Stream):
                raise ValueError("person_weight needs a source whose rows have places, not a stream")
            self.train = Repeated(self.train, self.train.with_people(), person_weight, self.seed)

    def make_recipe(self, reference_size: int, encoder: Encoder | None, held_out: bool) -> Recipe:
        cropping = replace(self.cropping, augmented_share=0.0, control_share=0.0) if held_out else self.cropping
        return CropRecipe(reference_size, self.target_size, encoder, cropping, self.depth_model)

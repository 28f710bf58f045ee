"""Instruction tuning on many tasks: templates drawn at train time, control pictures, and Table 1's mixture (Instruct-Imagen, Hu et al.
2024, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import numpy as np
from PIL import ImageChops, ImageFilter
from PIL.Image import Image

from ..models.encoder import Encoder
from ..prompt import CONTROLS, Record, RecordError, Reference, without_stop
from .controls import Control, makers
from .datamodule import MultimodalDataModule
from .images import open_picture, square_around
from .mixture import Mixture, check_ratios
from .recipe import Recipe
from .sources import Source, ToyboxSource, open_source


class DataSet(NamedTuple):
    """A row of Instruct-Imagen's Table 1: the task whose templates it takes, its ratio, and the toybox's task in its place."""

    task: str
    ratio: float
    toybox: str


DATA_SETS = {
    "internal": DataSet("txt2img", 0.15, "caption"),
    "wikiart": DataSet("txt2img", 0.05, "caption"),
    "depth": DataSet("depth", 0.06, "depth"),
    "mask": DataSet("mask", 0.06, "mask"),
    "edge": DataSet("edge", 0.06, "edge"),
    "sketch": DataSet("sketch", 0.02, "sketch"),
    "subjects": DataSet("subject", 0.30, "one subject"),
    "celeba": DataSet("face", 0.05, "one subject"),
    "celeb_hq": DataSet("face", 0.05, "one subject"),
    "styled": DataSet("styled", 0.10, "style"),
    "style_transfer": DataSet("transfer", 0.10, "style_transfer"),
}

SHOWN: dict[str, tuple[str, ...]] = {
    "txt2img": (),
    **{kind: (kind,) for kind in ("depth", "mask", "edge", "sketch")},
    "subject": ("subject",),
    "face": ("subject",),
    "styled": ("style",),
    "transfer": ("style", "content"),
}
"""What a template of each task shows: the roles of ``{ref1}`` and ``{ref2}``."""

WORDS = {"depth": "depth map", "edge": "edge map", "mask": "mask", "sketch": "sketch", "style": "style", "content": "content"}
"""What a reference of a role is called that has no phrase of its own."""

# -- templates -------------------------------------------------------------------------------------------------------------------


def placeholders(task: str) -> set[str]:
    """What each template of a task must hold; a style transfer has no caption."""
    return {f"ref{k + 1}" for k in range(len(SHOWN[task]))} | ({"caption"} if task != "transfer" else set())


def read_templates(task: str, folder: str | Path | None = None) -> tuple[str, ...]:
    """The templates of a task, one a line of ``<task>.txt`` in ``folder``; by default the hundred that come with the package.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: a line has not just the placeholders of the task, or there is none; by its place.
    """
    path = Path(folder or Path(__file__).parent / "templates") / f"{task}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise ValueError(f"{path}: holds no templates")
    for i, line in enumerate(lines):
        try:
            held = {name for _, name, _, _ in Formatter().parse(line) if name is not None}
        except ValueError as error:
            raise ValueError(f"{path}:{i + 1}: {error}") from error
        if missing := sorted(placeholders(task) - held):
            raise ValueError(f"{path}:{i + 1}: the template lacks {{{missing[0]}}}")
        if unknown := sorted(held - placeholders(task)):
            raise ValueError(f"{path}:{i + 1}: {task} has no {{{unknown[0]}}} to fill in")
    return tuple(lines)


def fill(template: str, task: str, caption: str | None, references: Iterable[Reference]) -> str:
    """The instruction that a template makes of a caption and references, without the caption's own full stop.

    Raises:
        RecordError: no caption, or no reference of a role that the task shows.
    """
    values, references = {}, list(references)
    for k, role in enumerate(SHOWN[task]):
        if not (own := [r for r in references if r.role == role]):
            raise RecordError(f"a record for {task} needs a reference of the role {role}")
        values[f"ref{k + 1}"] = naming(own)
    if "caption" in placeholders(task):
        values["caption"] = without_stop(caption)
        if not values["caption"]:
            raise RecordError(f"a record for {task} needs a caption")
    return template.format(**values)


def raw(record: Record) -> Record:
    """The record as its raw input: pictures and caption, and no word of what they are or what is to be done with them. Where a picture is
    the content, as in style transfer, its caption is discarded (section 3.2)."""
    references = tuple(replace(r, phrase="") for r in record.references)
    caption = "" if any(r.role == "content" for r in references) else record.caption or ""
    text = " ".join([*(f"[ref#{r.marker}]" for r in references), caption]).strip()
    return replace(record, instruction=text, references=references)


def naming(references: list[Reference]) -> str:
    """References in words, each phrase after the markers of all pictures of it: ``"[ref#1] [ref#2] dog and [ref#3] castle"``."""
    groups: dict[str, list[str]] = {}
    for r in references:
        phrase = WORDS.get(r.role, "") if r.phrase in ("", r.role) else r.phrase
        groups.setdefault(phrase, []).append(f"[ref#{r.marker}]")
    return " and ".join(" ".join([*markers, phrase]).strip() for phrase, markers in groups.items())


# -- recipe ----------------------------------------------------------------------------------------------------------------------


class InstructionRecipe(Recipe):
    """A record whose ``task`` is a data set of ``DATA_SETS`` gets an instruction by one of its templates, drawn at random, and the control
    picture that it may lack. Other records stay as they are.

    Args:
        templates: by task.
        max_references: of a record.
        edge_dilation: edges are thickened by up to so many pixels on each side, and those made here are the edges of the target, its
            depth or its mask, whichever there are, each as likely as the others (the paper's appendix); 0 does neither.
        instructions: use the templates; else a prompt is its raw input, pictures and caption (the paper's multi-task baseline).
        makers: what makes control pictures by kind; see :func:`~lightning_mmgen.data.controls.makers`.
    """

    def __init__(
        self,
        reference_size: int,
        target_size: int,
        encoder: Encoder | None,
        templates: Mapping[str, tuple[str, ...]],
        max_references: int = 5,
        edge_dilation: int = 2,
        instructions: bool = True,
        makers: Mapping[str, Control] | None = None,
    ) -> None:
        super().__init__(reference_size, target_size, encoder)
        self.templates, self.max_references, self.edge_dilation, self.makers = templates, max_references, edge_dilation, makers or {}
        self.instructions = instructions

    def compose(self, record: Record, root: Path | None, rng: np.random.Generator) -> Record:
        """Raises: RecordError: too many references, or something that the task needs is missing."""
        if record.task not in DATA_SETS:
            return record
        task, references = DATA_SETS[record.task].task, record.references
        if len(references) > self.max_references:
            raise RecordError(f"{len(references)} references are more than max_references={self.max_references}")
        if (kind := task) in ("depth", "mask", "edge", "sketch"):
            references = (self.control(record, kind, root, rng), *(r for r in references if r.role != kind))
        if not self.instructions:
            return raw(replace(record, references=references))
        templates = self.templates[task]
        template = templates[int(rng.integers(len(templates)))]
        return replace(record, instruction=fill(template, task, record.caption, references), references=references)

    def control(self, record: Record, kind: str, root: Path | None, rng: np.random.Generator) -> Reference:
        """The record's reference of this kind or one made here, of the square of the target that is to be drawn."""
        given = [r for r in record.references if r.role == kind]
        if len(given) > 1:
            raise RecordError(f"{len(given)} references of the role {kind}; one is needed")
        own = given[0] if given else Reference(1, "", "", kind)
        picture = open_picture(own.image, root) if given else self.make(record, kind, root, rng)
        if kind == "edge":
            picture = dilate(picture, int(rng.integers(self.edge_dilation + 1)))
        return replace(own, image=picture.crop(square_around(picture.size, ())))

    def make(self, record: Record, kind: str, root: Path | None, rng: np.random.Generator) -> Image:
        """A control picture that the record brings, or one of its target.

        Raises:
            RecordError: there is none, and nothing here that makes one.
        """
        assert record.target is not None
        if kind == "mask" and any(box.mask is not None for box in record.boxes):
            return union([open_picture(box.mask, root) for box in record.boxes if box.mask is not None])
        if kind == "edge" and kind in self.makers and self.edge_dilation:
            others = [k for k in ("depth", "mask") if self.can_make(record, k)]
            if k := int(rng.integers(len(others) + 1)):
                return self.makers[kind](self.make(record, others[k - 1], root, rng))
        if kind in record.controls:
            return open_picture(record.controls[kind], root)
        if kind in self.makers:
            return self.makers[kind](open_picture(record.target, root))
        raise RecordError(f"no {kind} picture, and nothing here that makes one")

    def can_make(self, record: Record, kind: str) -> bool:
        """Whether :meth:`make` finds what it needs."""
        return kind in record.controls or kind in self.makers or (kind == "mask" and any(box.mask is not None for box in record.boxes))


def union(masks: list[Image]) -> Image:
    """White where any of the masks is."""
    whole = masks[0]
    for mask in masks[1:]:
        whole = ImageChops.lighter(whole, mask)
    return whole


def dilate(edges: Image, pixels: int) -> Image:
    """Bright lines thickened by so many pixels on each side."""
    return edges.filter(ImageFilter.MaxFilter(2 * pixels + 1)) if pixels else edges


# -- data module -----------------------------------------------------------------------------------------------------------------


class InstructionDataModule(MultimodalDataModule):
    """Instruct-Imagen's second stage: data sets of several tasks in the ratios of Table 1, each record with an instruction by one of its
    task's templates.

    Args:
        train: by name of the data set (``internal``, ``wikiart``, ``depth``, ``mask``, ``edge``, ``sketch``, ``subjects``, ``celeba``,
            ``celeb_hq``, ``styled``, ``style_transfer``) its source or path; or ``toybox``: the same tasks in the embedded world.
        ratios: by the same names; Table 1's by default, which needs all of them.
        held_out: by name as well, or a source or path whose records have a data set's name as their task or keep their
            own instructions; ``toybox``; none is allowed.
        length: records an epoch; see :class:`~lightning_mmgen.data.mixture.Mixture`.
        repeat: sources start over when they are through; else that is an error.
        max_references: a record with more is a bad row.
        templates: folder with a ``<task>.txt`` for every task that the sources have, in place of the package's.
        edge_dilation, instructions: see :class:`InstructionRecipe`; no dilation of the held-out set.
        depth_model: hub name or folder of a depth model; it makes the depth pictures that records lack, on the CPU of a loader process.
        settings: of :class:`~lightning_mmgen.data.datamodule.MultimodalDataModule`.

    Raises:
        ValueError: an unknown data set, ratios that are no shares, or a template without its placeholder.
    """

    squares = True

    def __init__(
        self,
        train: str | dict[str, Source | str],
        ratios: dict[str, float] | None = None,
        held_out: str | Source | dict[str, Source | str] | None = None,
        length: int | None = None,
        repeat: bool = True,
        max_references: int = 5,
        templates: str | None = None,
        edge_dilation: int = 2,
        instructions: bool = True,
        depth_model: str | None = None,
        **settings: Any,
    ) -> None:
        if max_references < 1 or edge_dilation < 0:
            raise ValueError(f"max_references must be 1 or more and edge_dilation 0 or more, not {max_references} and {edge_dilation}")
        ratios = {name: data_set.ratio for name, data_set in DATA_SETS.items()} if ratios is None else ratios
        seed = settings.get("seed", 0)
        mixture = Mixture(open_sources(train, ratios, held_out=False), ratios, length, seed, repeat)
        if isinstance(held_out, dict) or held_out == "toybox":
            held_out = Mixture(open_sources(held_out, ratios, held_out=True), ratios, 256 if held_out == "toybox" else None, seed)
        super().__init__(mixture, held_out, **settings)
        of_task = {"face": "subject"} if train == "toybox" else {}  # toys have no faces
        tasks = sorted({DATA_SETS[name].task for name in ratios})
        self.templates = {task: read_templates(of_task.get(task, task), templates) for task in tasks}
        self.max_references, self.edge_dilation, self.instructions = max_references, edge_dilation, instructions
        able = tuple(kind for kind in CONTROLS if kind in ("depth", *ratios) and (kind != "edge" or find_spec("cv2")))
        self.makers = makers(able, depth_model)

    def make_recipe(self, reference_size: int, encoder: Encoder | None, held_out: bool) -> Recipe:
        dilation = 0 if held_out else self.edge_dilation
        settings = (self.templates, self.max_references, dilation, self.instructions, self.makers)
        return InstructionRecipe(reference_size, self.target_size, encoder, *settings)


def open_sources(sources: dict[str, Source | str] | str, ratios: dict[str, float], held_out: bool) -> dict[str, Source]:
    """The sources of a mixture, opened; those of the toybox have the tasks that stand for the data sets.

    Raises:
        ValueError: an unknown data set, or names and ratios that do not go together.
    """
    if isinstance(sources, str) and sources != "toybox":
        raise ValueError(f"sources are given by the names of their data sets, or are 'toybox', not {sources!r}")
    names = ratios if isinstance(sources, str) else sources
    if unknown := sorted((set(names) | set(ratios)) - set(DATA_SETS)):
        raise ValueError(f"unknown data set {unknown[0]!r}; there are {', '.join(DATA_SETS)}")
    check_ratios(set(names), ratios)
    if isinstance(sources, str):
        return {name: _toybox(name, held_out) for name in ratios}
    return {name: open_source(source) if isinstance(source, str) else source for name, source in sources.items()}


def _toybox(name: str, held_out: bool) -> ToyboxSource:
    """Records of the embedded world for a data set; each has a seed of its own."""
    return ToyboxSource({DATA_SETS[name].toybox: 1.0}, seed=list(DATA_SETS).index(name), held_out=held_out, told=True)

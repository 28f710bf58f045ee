"""Records and multimodal prompts: what one row of data says, checked, and read from or written to JSON.

A :class:`Record` is an instruction text with ``[ref#k]`` markers, the references that the markers name, and a target picture.
Everything that the framework trains on is such a record, whatever the method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

from PIL.Image import Image

VERSION = 1
KINDS = ("", "person", "head")
CONTROLS = ("edge", "depth", "sketch")
ROLES = ("subject", "style", "content", "source", "depth", "edge", "mask", "sketch", "crop", "neighbour")
MARKER = re.compile(r"\[ref#(\d+)\]")
EDIT = "In the [ref#1] picture, {}"
"""The prompt of an edit, around its instruction in plain words."""

Picture = str | bytes | Image
"""A path (relative to the record file), the bytes of an encoded picture, or a picture in memory."""


class RecordError(ValueError):
    """A record that cannot be used; the message is one line and says why."""


@dataclass(frozen=True)
class Reference:
    """One picture of a prompt: its marker's number k, the phrase that it shows, its role, and the picture."""

    marker: int
    image: Picture
    phrase: str = ""
    role: str = "subject"


class Box(NamedTuple):
    """Where the object of a phrase lies in the target.

    Attributes:
        phrase: the words for it.
        left, top, right, bottom: pixels of the upright target, ``left < right`` and ``top < bottom``.
        kind: ``"person"``, a person's ``"head"`` (same phrase and start as the person's), or "" for anything else.
        start: where the phrase begins in the caption, in characters; None for its first occurrence.
        mask: the object's segmentation as a grey picture of the target's size, white where the object is.
    """

    phrase: str
    left: float
    top: float
    right: float
    bottom: float
    kind: str = ""
    start: int | None = None
    mask: Picture | None = None


class Segment(NamedTuple):
    """A piece of a prompt in reading order: text, or a reference where ``reference`` is its index among the references."""

    text: str
    reference: int | None


@dataclass(frozen=True)
class MultimodalPrompt:
    """An instruction and its references: what an encoder reads.

    Raises:
        RecordError: a marker without its reference, a reference without a marker, or a marker given twice.
    """

    instruction: str
    references: tuple[Reference, ...] = ()

    def __post_init__(self) -> None:
        given = [r.marker for r in self.references]
        if len(set(given)) != len(given):
            raise RecordError(f"references share a marker: {sorted(given)}")
        named = {int(k) for k in MARKER.findall(self.instruction)}
        for k in sorted(named - set(given)):
            raise RecordError(f"marker [ref#{k}] has no reference")
        for k in sorted(set(given) - named):
            raise RecordError(f"reference {k} has no marker [ref#{k}] in the instruction")

    def segments(self) -> list[Segment]:
        """The prompt cut at its markers, empty texts left out; a marker that occurs twice yields its reference twice."""
        return split(self.instruction, [r.marker for r in self.references])

    def bare(self) -> str:
        """The instruction without its references: markers go, and a neighbour goes with its caption (``"[ref#1] caption."``)."""
        text = self.instruction
        for reference in self.references:
            if reference.role == "neighbour":
                text = text.replace(f"[ref#{reference.marker}] {reference.phrase}.", "")
        return without_markers(text)


def without_stop(caption: str | None) -> str:
    """A caption without the full stop at its end, as templates put it in words of their own."""
    return (caption or "").strip().rstrip(".")


def in_context(neighbours: Sequence[Reference], caption: str) -> str:
    """The instruction of a picture after its neighbours: ``"[ref#1] caption. [ref#2] caption. Generate: caption"``."""
    return " ".join([*(f"[ref#{r.marker}] {r.phrase}." for r in neighbours), f"Generate: {caption}"])


def without_markers(text: str) -> str:
    """The words of a text with ``[ref#k]`` markers, one space between them."""
    return " ".join(MARKER.sub("", text).split())


def split(instruction: str, markers: list[int]) -> list[Segment]:
    """Cut ``instruction`` at its ``[ref#k]`` markers; ``markers[i]`` is the number of reference i. Any other marker is text."""
    out: list[Segment] = []
    at = 0
    for match in MARKER.finditer(instruction):
        if int(match[1]) not in markers:
            continue
        if match.start() > at:
            out.append(Segment(instruction[at : match.start()], None))
        out.append(Segment("", markers.index(int(match[1]))))
        at = match.end()
    if at < len(instruction):
        out.append(Segment(instruction[at:], None))
    return out


@dataclass(frozen=True)
class Record:
    """One row of data, format version 1.

    Attributes:
        instruction: text with ``[ref#k]`` markers; may be empty only in a question (``question`` set).
        references: the pictures that the markers name.
        target: the picture to generate; absent for questions.
        caption: the target in plain words, for CLIP scores.
        source_caption: the source picture in plain words, for directional similarity.
        description: all that is known of the target in words, what references show included, for a teacher that reads words
            (:class:`~lightning_mmgen.callbacks.CaptionTeacher`); the caption stands in for it.
        foil: a description of what the target is not: another picture, unlike it in the details alone that references show (a foil in
            the sense of FOIL-COCO, Shekhar et al. 2017).
        task: name of the task, for mixing and for tables.
        mask: edit mask of the target, white where it may change.
        boxes: where phrases of the caption (or else of the instruction) lie in the target.
        controls: pictures of the target's layout that were made beforehand, by kind (``edge``, ``depth``, ``sketch``).
        session, turn: which multi-turn edit this row belongs to, and its place in it, from 0.
        question, answer: visual question answering.
        id: a name for tables and grids.
    """

    instruction: str = ""
    references: tuple[Reference, ...] = ()
    target: Picture | None = None
    caption: str | None = None
    source_caption: str | None = None
    description: str | None = None
    foil: str | None = None
    task: str = "instruct"
    mask: Picture | None = None
    boxes: tuple[Box, ...] = ()
    controls: Mapping[str, Picture] = field(default_factory=dict)
    session: str | None = None
    turn: int | None = None
    question: str | None = None
    answer: str | None = None
    id: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
    needs_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.instruction.strip() and self.question is None:
            raise RecordError("instruction is empty")
        if (self.question is None) != (self.answer is None):
            raise RecordError("question and answer go together")
        if self.target is None and self.question is None and self.needs_target:
            raise RecordError("target is missing")
        if (self.session is None) != (self.turn is None):
            raise RecordError("session and turn go together")
        self.prompt()  # markers against references

    def prompt(self) -> MultimodalPrompt:
        """What the encoder reads."""
        text = self.instruction if self.question is None else f"{self.instruction} {self.question}".strip()
        return MultimodalPrompt(text, self.references)

    def pictures(self) -> list[Picture]:
        """Every picture that the record holds or names."""
        held = (*(r.image for r in self.references), self.target, self.mask, *self.controls.values(), *(b.mask for b in self.boxes))
        return [picture for picture in held if picture is not None]

    def map_pictures(self, change: Callable[[Picture, str], Picture]) -> Record:
        """The record with every picture replaced by ``change(picture, name)``; names are ``ref1`` (its marker), ``target``, ``mask``,
        the kind of a control, ``box0`` (the mask of the first box)."""

        def changed(picture: Picture | None, name: str) -> Picture | None:
            return None if picture is None else change(picture, name)

        return replace(
            self,
            references=tuple(replace(r, image=change(r.image, f"ref{r.marker}")) for r in self.references),
            target=changed(self.target, "target"),
            mask=changed(self.mask, "mask"),
            controls={kind: change(picture, kind) for kind, picture in self.controls.items()},
            boxes=tuple(box._replace(mask=changed(box.mask, f"box{i}")) for i, box in enumerate(self.boxes)),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain types, without empty fields; pictures must be paths.

        Raises:
            RecordError: a picture is held in memory.
        """
        row = {k: v for k, v in asdict(self).items() if v not in (None, (), "", {}) and k != "extra"}
        if self.boxes:
            row["boxes"] = [{k: v for k, v in box._asdict().items() if v not in (None, "") or k == "phrase"} for box in self.boxes]
        for picture in self.pictures():
            if not isinstance(picture, str):
                raise RecordError("a picture in memory has no path: write it to a file first")
        return {"version": VERSION, **row}


@dataclass(frozen=True)
class PromptRecord(Record):
    """An instruction to evaluate, which nothing is known to answer: it may have no target."""

    needs_target: ClassVar[bool] = False


_FIELDS = {f.name for f in fields(Record)} - {"extra"}


def from_json(row: Mapping[str, Any]) -> Record:
    """Build a record from one JSON object (or a parquet row), with every key and type checked.

    Raises:
        RecordError: an unknown key, a wrong version or type, or a record that contradicts itself.
    """
    if not isinstance(row, Mapping):
        raise RecordError(f"a row is an object, not {type(row).__name__}")
    values = {k: v for k, v in row.items() if v is not None}
    if (version := values.pop("version", VERSION)) != VERSION:
        raise RecordError(f"version {version!r} is not {VERSION}")
    if unknown := sorted(set(values) - _FIELDS):
        raise RecordError(f"unknown key {unknown[0]!r}")
    for key in _FIELDS - {"references", "boxes", "controls", "target", "mask", "turn"}:
        if key in values and not isinstance(values[key], str):
            raise RecordError(f"{key} must be a string, not {type(values[key]).__name__}")
    if "turn" in values and (type(values["turn"]) is not int or values["turn"] < 0):
        raise RecordError("turn must be an integer, 0 or more")
    for key in ("target", "mask"):
        if key in values:
            values[key] = _picture(values[key], key)
    values["references"] = tuple(_reference(r, i) for i, r in enumerate(_list(values, "references")))
    values["boxes"] = tuple(_box(b, i) for i, b in enumerate(_list(values, "boxes")))
    values["controls"] = _controls(values.get("controls", {}))
    return Record(**values)


def _list(values: Mapping[str, Any], key: str) -> list[Any]:
    value = values.get(key, [])
    if not isinstance(value, (list, tuple)):
        raise RecordError(f"{key} must be a list")
    return list(value)


def _picture(value: Any, key: str) -> Picture:
    if isinstance(value, Mapping):  # the `datasets` library's picture column
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (str, bytes, Image)) or not value:
        raise RecordError(f"{key} must be a path or the bytes of a picture")
    return value


def _reference(value: Any, index: int) -> Reference:
    if not isinstance(value, Mapping):
        raise RecordError(f"references[{index}] must be an object")
    if unknown := sorted(set(value) - {"marker", "image", "phrase", "role"}):
        raise RecordError(f"references[{index}] has an unknown key {unknown[0]!r}")
    marker, role, phrase = value.get("marker"), value.get("role") or "subject", value.get("phrase") or ""
    if not isinstance(marker, int) or isinstance(marker, bool) or marker < 1:
        raise RecordError(f"references[{index}].marker must be an integer, 1 or more")
    if role not in ROLES:
        raise RecordError(f"references[{index}].role {role!r} is not one of {', '.join(ROLES)}")
    if not isinstance(phrase, str):
        raise RecordError(f"references[{index}].phrase must be a string")
    return Reference(marker, _picture(value.get("image"), f"references[{index}].image"), phrase, role)


def _controls(value: Any) -> dict[str, Picture]:
    if not isinstance(value, Mapping):
        raise RecordError("controls must be an object")
    if unknown := sorted(set(value) - set(CONTROLS)):
        raise RecordError(f"controls has an unknown key {unknown[0]!r}; there are {', '.join(CONTROLS)}")
    return {kind: _picture(picture, f"controls.{kind}") for kind, picture in value.items() if picture is not None}


def _box(value: Any, index: int) -> Box:
    try:
        box = Box(**value) if isinstance(value, Mapping) else Box(*value)
    except TypeError as error:
        raise RecordError(f"boxes[{index}] needs phrase, left, top, right, bottom") from error
    box = box._replace(kind=box.kind or "")
    if not isinstance(box.phrase, str) or any(type(edge) not in (int, float) for edge in box[1:5]):
        raise RecordError(f"boxes[{index}] must be a string and four numbers")
    if not (box.left < box.right and box.top < box.bottom):
        raise RecordError(f"boxes[{index}] has no area")
    if box.kind not in KINDS:
        raise RecordError(f"boxes[{index}].kind {box.kind!r} is not one of {', '.join(filter(None, KINDS))}")
    if box.start is not None and (type(box.start) is not int or box.start < 0):
        raise RecordError(f"boxes[{index}].start must be an integer, 0 or more")
    return box if box.mask is None else box._replace(mask=_picture(box.mask, f"boxes[{index}].mask"))

"""Published layouts of edits, through ``datasets``: what each calls its columns, and each of its rows as an :class:`Edit`.

InstructPix2Pix (Brooks et al. 2023), MagicBrush (Zhang et al. 2023), OmniGen's JSONL (Xiao et al. 2024), the examples of Step1X-Edit.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..data.sources import Lines
from ..prompt import EDIT, MARKER, RecordError, without_markers
from .captions import ENDINGS, read_json
from .journal import digest_of


class Columns(NamedTuple):
    """What a layout calls the parts of an edit; "" for what it has not."""

    source: str
    target: str
    instruction: str
    mask: str = ""
    session: str = ""
    turn: str = ""
    caption: str = ""
    source_caption: str = ""


PUBLISHED = {
    "instructpix2pix": Columns("original_image", "edited_image", "edit_prompt", caption="edited_prompt", source_caption="original_prompt"),
    "magicbrush": Columns("source_img", "target_img", "instruction", "mask_img", "img_id", "turn_index"),
    "omnigen": Columns("input_images", "output_image", "instruction"),
    "step1x": Columns("source", "target", "instruction"),
}


class Dropped(RecordError):
    """A row that a rule drops.

    Args:
        rule: its name among the counts.
        detail: what is wrong with the row, where it is damaged.
    """

    def __init__(self, rule: str, detail: str = "") -> None:
        super().__init__(detail or rule)
        self.rule, self.detail = rule, detail


@dataclass(frozen=True)
class Edit:
    """One row of any layout; its pictures are bytes or paths, and may be missing or unreadable.

    Attributes:
        instruction: with the markers of all pictures before the edit.
        pictures: these, [ref#1] first. One alone is the edit's source, several are subjects.
        target: the picture after the edit.
        mask: the source with the region to edit cut out.
        session, turn: which multi-turn edit it belongs to, and its place there, from 0.
        caption, source_caption: target and source in words; "" where the layout has none.
    """

    instruction: str
    pictures: tuple[str | bytes, ...]
    target: str | bytes | None
    mask: str | bytes | None = None
    session: str | None = None
    turn: int | None = None
    caption: str = ""
    source_caption: str = ""


class Item(NamedTuple):
    """What is noted as done together: a row, or the rows of a session in the order of their turns; read when iterated over."""

    key: str
    rows: Iterable[tuple[int, Any]]


class Layout(ABC):
    """Rows of edits.

    Args:
        columns: their parts' names.
        root: folder that paths are relative to, and may not leave; None where there is none.
        digest: a hash of what the rows are.
    """

    def __init__(self, columns: Columns, root: Path | None, digest: str) -> None:
        self.columns, self.root, self.digest = columns, root, digest

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """All rows, by their numbers, in a fixed order."""

    @abstractmethod
    def edit(self, row: Any) -> Edit:
        """Raises: Dropped: the row is not an edit."""


class Table(Layout):
    """Rows of ``datasets`` as Arrow, so that pictures stay bytes; read in their order, where they are streamed too."""

    def __init__(self, rows: Any, columns: Columns, root: Path | None, digest: str) -> None:
        super().__init__(columns, root, digest)
        self.rows = rows.select_columns(list(dict.fromkeys(filter(None, columns)))).with_format("arrow")

    def items(self) -> Iterator[Item]:
        return (Item(str(number), [(number, row)]) for number, row in enumerate(self.rows))

    def edit(self, row: Any) -> Edit:
        values, columns = row.to_pylist()[0], self.columns
        parts = {part: values[name] for part, name in columns._asdict().items() if name}
        text = words(parts["instruction"])
        if not text:
            raise Dropped("instruction empty")
        if (source := picture_of(parts["source"])) is None:
            raise Dropped("instruction without source")
        session, turn = (parts["session"], parts["turn"]) if columns.session else (None, None)
        if columns.session and (session is None or type(turn) is not int):
            raise Dropped("bad row", f"{columns.session} is {session!r} and {columns.turn} {turn!r}")
        return Edit(
            EDIT.format(text),
            (source,),
            picture_of(parts["target"]),
            picture_of(parts.get("mask")),
            None if session is None else str(session),
            None if turn is None else turn - 1,
            words(parts.get("caption")),
            words(parts.get("source_caption")),
        )


class Sessions(Table):
    """Rows of ``datasets`` on disk, in any order, by their sessions."""

    def items(self) -> Iterator[Item]:
        names = [self.columns.session, self.columns.turn]
        sessions: dict[str, list[tuple[float, int]]] = {}
        for number, row in enumerate(self.rows.select_columns(names)[:].to_pylist()):
            session, turn = (row[name] for name in names)
            sessions.setdefault(str(session), []).append((turn if type(turn) is int else math.inf, number))
        for key, turns in sessions.items():
            yield Item(key, ((number, self.rows[number]) for _, number in sorted(turns)))


class OmniGen(Layout):
    """Lines of JSON: an instruction with ``<img><|image_k|></img>`` placeholders, the paths of its pictures, and the target's."""

    PLACEHOLDER = re.compile(r"(?:<img>\s*)?<\|image_(\d{1,4})\|>(?:\s*</img>)?")

    def __init__(self, lines: Lines, columns: Columns, root: Path) -> None:
        super().__init__(columns, root, lines.digest)
        self.lines = lines

    def items(self) -> Iterator[Item]:
        return (Item(str(number), [(number, self.lines[number])]) for number in range(len(self.lines)))

    def edit(self, row: Any) -> Edit:
        try:
            values = json.loads(row)
            text, pictures, target = values[self.columns.instruction], values.get(self.columns.source), values[self.columns.target]
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise Dropped("bad row", f"is not a row of OmniGen ({type(error).__name__}: {error})") from error
        pictures = tuple(pictures) if isinstance(pictures, list) else () if pictures is None else (pictures,)
        if not all(isinstance(value, str) for value in (text, target, *pictures)):
            raise Dropped("bad row", "instruction and paths must be strings")
        text = self.PLACEHOLDER.sub(lambda m: f"[ref#{int(m[1])}]", words(text))
        named = {int(k) for k in MARKER.findall(text)}
        if not without_markers(text):
            raise Dropped("instruction empty")
        if named != set(range(1, len(pictures) + 1)):
            raise Dropped("placeholders and pictures disagree")
        if not pictures:
            raise Dropped("instruction without source")
        return Edit(text, pictures, target)


def words(text: Any) -> str:
    """A text as one line, without ``[ref#k]`` markers and what UTF-8 cannot hold; "" for anything else."""
    return without_markers(text.encode(errors="replace").decode()) if isinstance(text, str) else ""


def picture_of(value: Any) -> str | bytes | None:
    """The picture of a column: bytes, a path, or either in the struct of ``datasets``."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, str | bytes) and value else None


# -- where they are ---------------------------------------------------------------------------------------------------------------


def open_layout(data: str, form: str | None, names: Mapping[str, str | None], split: str, images: str) -> Layout:
    """The rows of a data set.

    Args:
        data: OmniGen: a ``.jsonl``; Step1X-Edit: a ``.json`` {picture: instruction}, or its folder, with ``STEM_source.*`` and
            ``STEM_target.*`` beside it; else a ``.parquet``, a folder of them or of ``save_to_disk``, or a hub name.
        form: one of ``PUBLISHED``; guessed by default.
        names: of :class:`Columns` that are not as published; None for those that are.
        split: of a data set that has several.
        images: folder of pictures that are given by a path, instead of the data's.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: the format cannot be guessed, or the data is of another form.
    """
    place = Path(data)
    if not place.exists() and (data.startswith((".", "/", "~")) or place.suffix in (".jsonl", ".json", ".parquet")):
        raise FileNotFoundError(f"{data}: no such file or folder")
    if images and not Path(images).is_dir():
        raise FileNotFoundError(f"{images}: no such folder")
    form = form or _guess(place)
    root = Path(images) if images else place if place.is_dir() else place.parent if place.is_file() else None
    given = {part: name for part, name in names.items() if name is not None}
    if other := sorted(set(given) - set({"omnigen": Columns._fields[:3], "step1x": ()}.get(str(form), Columns._fields))):
        raise ValueError(f"--{other[0].replace('_', '-')}-column: the format {form} has none")
    if form == "omnigen":
        return OmniGen(Lines(place), PUBLISHED[form]._replace(**given), root or place.parent)
    if form == "step1x":
        return Table(_step1x(place, root or place.parent), PUBLISHED[form], root, files_digest(place))
    rows = open_rows(data, split, streaming=True)
    have = rows.column_names or list(next(iter(rows), {}))
    columns = _columns(data, form, have)._replace(**given)
    _check(data, columns, have)
    if columns.session:
        return Sessions(open_rows(data, split, streaming=False), columns, root, files_digest(place))
    return Table(rows, columns, root, files_digest(place))


def _guess(place: Path) -> str | None:
    """The format where files tell it; None where columns do."""
    if place.suffix == ".jsonl":
        return "omnigen"
    return "step1x" if place.suffix == ".json" or any(place.glob("prompt*.json")) else None


def _columns(data: str, form: str | None, have: list[str]) -> Columns:
    """The columns of the format, or of the one that these columns tell."""
    if form is not None:
        return PUBLISHED[form]
    for columns in (PUBLISHED["instructpix2pix"], PUBLISHED["magicbrush"]):
        if {columns.source, columns.target, columns.instruction} <= set(have):
            return columns
    raise ValueError(f"{data}: --format cannot be guessed from the columns {', '.join(have)}; give one of {', '.join(PUBLISHED)}")


def _check(data: str, columns: Columns, have: list[str]) -> None:
    """Raises: ValueError: a column is missing, or needed and left out."""
    for part, name in columns._asdict().items():
        if name and name not in have:
            raise ValueError(f"{data}: has no column {name!r} (--{part.replace('_', '-')}-column); there are {', '.join(have)}")
    if not all(columns[:3]) or bool(columns.session) != bool(columns.turn):
        raise ValueError("source, target and instruction need a column each; session and turn go together")


def open_rows(data: str, split: str, streaming: bool) -> Any:
    """Rows of ``datasets``; those that ``save_to_disk`` wrote are at hand in any case."""
    import datasets

    place = Path(data)
    if place.is_file():
        return datasets.load_dataset("parquet", data_files=data, split="train", streaming=streaming)
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        rows = datasets.load_from_disk(data)
        if isinstance(rows, datasets.DatasetDict) and split not in rows:
            raise ValueError(f"{data}: no split {split!r}; there are {', '.join(rows)}")
        return rows[split] if isinstance(rows, datasets.DatasetDict) else rows
    return datasets.load_dataset(data, split=split, streaming=streaming)


def _step1x(place: Path, folder: Path) -> Any:
    """The examples of Step1X-Edit as rows; a picture that is not there is None."""
    import datasets

    files = [place] if place.is_file() else sorted(place.glob("prompt*.json"))
    if len(files) != 1:
        raise ValueError(f"{place}: holds {len(files)} files prompt*.json, not one")
    prompts = read_json(files[0])
    if not isinstance(prompts, dict) or not prompts or not all(isinstance(text, str) for text in prompts.values()):
        raise ValueError(f"{files[0]}: is not an object of instructions by picture")
    pictures = {path.stem: path.name for path in sorted(folder.iterdir()) if path.suffix.lower() in ENDINGS}
    stems = [Path(name).stem for name in prompts]
    sides = {side: [pictures.get(f"{stem}_{side}") for stem in stems] for side in ("source", "target")}
    return datasets.Dataset.from_dict({**sides, "instruction": list(prompts.values())})


def files_digest(place: Path) -> str:
    """Names and sizes of the files; the hub's name alone."""
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    return digest_of([f"{path.relative_to(place)} {path.stat().st_size}" for path in files if path.is_file()] or [str(place)])

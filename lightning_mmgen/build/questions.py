"""``mmgen build questions``: published pictures with questions, answers or captions as records of questions.

Flickr30k (Young et al. 2014), RLAIF-V (Yu et al. 2024), OCR-VQA (Mishra et al. 2019), and LAION (Schuhmann et al. 2022) as ``img2dataset``
writes it: the data of Diffusion Instruction Tuning (Jin et al. 2025).
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image as PILImage
from tqdm import tqdm

from ..data.images import FORMATS, locate_file, open_picture
from ..prompt import Record, RecordError, Reference
from .edits import ENDINGS
from .journal import Journal, Shard, check_apart
from .layouts import Dropped, files_digest, open_rows, picture_of, words


class Columns(NamedTuple):
    """What a layout calls the parts of a question; ``question`` is "" where its answers are captions. A column may hold lists, of the
    questions and answers of one picture."""

    image: str
    answer: str
    question: str = ""
    id: str = ""


PUBLISHED = {
    "flickr30k": Columns("image", "caption", id="img_id"),
    "rlaifv": Columns("image", "chosen", "question", "idx"),
    "ocrvqa": Columns("image", "answers", "questions", "image_id"),
    "laion": Columns("jpg", "txt", id="__key__"),
}


@dataclass(frozen=True)
class Questions:
    """What the records depend on.

    Attributes:
        data: hub name, folder of ``save_to_disk`` or of files, ``.parquet``, or (laion) a ``.tar`` or a folder of them.
        format: of ``PUBLISHED``; guessed by default.
        split: of a data set that has several.
        images: folder of pictures that are given by a path; "" for the data's own.
        question: what is asked where the answers are captions.
        per_image: most questions of a picture; 0 for all.
        max_rows: rows to read; 0 for all.
        image_column, ...: what the data calls them; as published by default.

    Raises:
        ValueError: the question is empty, or a number is negative.
    """

    data: str
    format: str | None = None
    split: str = "train"
    images: str = ""
    question: str = "Describe the picture."
    per_image: int = 0
    max_rows: int = 0
    image_column: str | None = None
    question_column: str | None = None
    answer_column: str | None = None
    id_column: str | None = None

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("--question is empty")
        if min(self.per_image, self.max_rows) < 0:
            raise ValueError("--per-image and --max-rows must be 0 or more")

    def rows(self) -> tuple[Any, Columns]:
        """The rows of the data set as Arrow, and its columns.

        Raises:
            FileNotFoundError: no such file or folder.
            ValueError: the format cannot be guessed, or a column is missing.
        """
        place = Path(self.data)
        if not place.exists() and (self.data.startswith((".", "/", "~")) or place.suffix in (".parquet", ".tar")):
            raise FileNotFoundError(f"{self.data}: no such file or folder")
        if self.images and not Path(self.images).is_dir():
            raise FileNotFoundError(f"{self.images}: no such folder")
        rows = _tars(place) if place.suffix == ".tar" or any(place.glob("*.tar")) else open_rows(self.data, self.split, streaming=True)
        have = list(rows.column_names or next(iter(rows), {}))
        given = {part: name for part in Columns._fields if (name := getattr(self, f"{part}_column")) is not None}
        columns = self._published(have)._replace(**given)
        for part, name in columns._asdict().items():
            if name and name not in have:
                raise ValueError(f"{self.data}: has no column {name!r} (--{part}-column); there are {', '.join(have)}")
        return rows.select_columns(list(dict.fromkeys(filter(None, columns)))).with_format("arrow"), columns

    def _published(self, have: list[str]) -> Columns:
        """The columns of the format, or of the one that these columns tell."""
        if self.format is not None:
            return PUBLISHED[self.format]
        found = [columns for columns in PUBLISHED.values() if set(filter(None, columns)) <= set(have)]
        if not found:
            raise ValueError(
                f"{self.data}: --format cannot be guessed from the columns {', '.join(have)}; give one of {', '.join(PUBLISHED)}"
            )
        return found[0]


def _tars(place: Path) -> Any:
    """Rows of WebDataset's archives: bytes by ending, and ``__key__``."""
    import datasets

    files = [str(path) for path in ([place] if place.is_file() else sorted(place.glob("*.tar")))]
    rows = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    return rows.cast_column("jpg", datasets.Image(decode=False)) if "jpg" in (rows.column_names or next(iter(rows), {})) else rows


def build_questions(settings: Questions, out: str, shard: Shard = Shard()) -> str:
    """Write a record for every question; a stopped build goes on. Every shard reads the whole of a stream.

    Returns:
        A report: the path of the records, and counts by rule.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: data of another form, or ``out`` lies among it or holds a build with other settings.
    """
    check_apart(out, settings.data)
    place = Path(settings.data)
    rows, columns = settings.rows()
    root = Path(settings.images) if settings.images else place if place.is_dir() else place.parent if place.is_file() else None
    journal = Journal(out, {**asdict(settings), "digest": files_digest(place)}, shard)
    importer = Importer(columns, settings, root, journal.out)
    last = settings.max_rows or None
    for number, row in islice(enumerate(tqdm(islice(rows, last), desc="questions", disable=None)), shard.index, None, shard.count):
        if str(number) not in journal.done:
            journal.add(str(number), *importer(number, row.to_pylist()[0]))
    return journal.conclude()


class Importer:
    """Makes records of a row's questions, and its picture part of the build.

    Args:
        columns: their names.
        settings: of the build.
        root: folder that paths are relative to, and may not leave; None where there is none.
        out: folder of the build.
    """

    def __init__(self, columns: Columns, settings: Questions, root: Path | None, out: Path) -> None:
        self.columns, self.settings, self.root, self.out = columns, settings, root, out

    def __call__(self, number: int, row: dict[str, Any]) -> tuple[list[Record], Counter[str]]:
        """The records of a row, and counts by rule."""
        counts: Counter[str] = Counter(rows=1)
        try:
            pairs = list(self._pairs(row, counts))
            if not pairs:
                raise Dropped("no question with an answer")
            reference = Reference(1, self._write(number, self._read(picture_of(row[self.columns.image]))), "", "content")
        except Dropped as error:
            counts[error.rule] += 1
            if error.detail:
                tqdm.write(f"row {number + 1}: {error.rule}: {error.detail}", sys.stderr)
            return [], counts
        counts["kept"] += len(pairs)
        name = f"{number:08d}" if not self.columns.id or row[self.columns.id] is None else words(str(row[self.columns.id]))
        captions = not self.columns.question
        return [
            Record(
                "[ref#1]",
                (reference,),
                caption=answer if captions else None,
                task="question",
                question=question,
                answer=answer,
                id=name if len(pairs) == 1 else f"{name}-{k}",
            )
            for k, (question, answer) in enumerate(pairs)
        ], counts

    def _pairs(self, row: dict[str, Any], counts: Counter[str]) -> Iterator[tuple[str, str]]:
        """Questions and answers, those that lack either left out and counted. Raises: Dropped: their numbers differ."""
        answers = _list(row[self.columns.answer])
        questions = _list(row[self.columns.question]) if self.columns.question else [self.settings.question] * len(answers)
        if len(questions) != len(answers):
            raise Dropped("bad row", f"{len(questions)} questions, {len(answers)} answers")
        pairs = [(words(q), words(a)) for q, a in zip(questions, answers, strict=True)]
        counts.update("answer empty" if q else "question empty" for q, a in pairs if not (q and a))
        yield from islice((pair for pair in pairs if all(pair)), self.settings.per_image or None)

    def _read(self, picture: str | bytes | None) -> bytes:
        try:
            if picture is None or (isinstance(picture, str) and self.root is None):
                raise RecordError("there is none" if picture is None else f"{picture}: a data set of the hub has no folder; give --images")
            data = locate_file(picture, self.root or Path()).read_bytes() if isinstance(picture, str) else picture
            open_picture(data)
            return data
        except (RecordError, OSError) as error:
            raise Dropped("picture unreadable", str(error)) from error

    def _write(self, number: int, data: bytes) -> str:
        """The picture's file, its bytes as they are; the path relative to ``out``."""
        with PILImage.open(io.BytesIO(data), formats=FORMATS) as image:
            kind = str(image.format)
        path = self.out / "images" / f"{number // 1000:05d}" / f"{number:08d}.{ENDINGS.get(kind, kind.lower())}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path.relative_to(self.out).as_posix()


def _list(value: Any) -> list[Any]:
    """A column's values; bytes (of an archive's text file) as text."""
    values = value if isinstance(value, list) else [value]
    return [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values]

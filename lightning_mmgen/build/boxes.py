"""Boxes that exist already: COCO (Lin et al. 2014), GRIT (Peng et al. 2023, arXiv 2306.14824), Flickr30k Entities (Plummer et al. 2015)."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from ..data.images import Edges
from .captions import Caption, Found, Scene, coco_captions, line, read_json, read_jsonl
from .phrases import bare, is_person
from .words import COCO, KIND_OF, PERSONS, WITHOUT_PLURAL, plural

FORMATS = ("coco", "grit", "flickr30k")


def read_boxes(path: str, form: str | None = None, captions: str | None = None) -> list[Scene]:
    """Captioned pictures with their boxes.

    Args:
        path: COCO: instances (and keypoints) as a ``.json`` or a folder of them; GRIT: a ``.jsonl`` or ``.parquet``, or a folder of them;
            Flickr30k Entities: the folder that holds ``Sentences`` and ``Annotations``.
        form: one of ``FORMATS``; guessed by default.
        captions: COCO: the captions' file, where the folder does not hold it.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: the format cannot be guessed, or a file is of another form.
    """
    place = Path(path)
    form = form or guess(place)
    scenes = {"coco": _coco, "grit": _grit, "flickr30k": _flickr30k}[form](place, captions)
    if not scenes:
        raise ValueError(f"{path}: holds no captioned pictures of the format {form}")
    return scenes


def guess(place: Path) -> str:
    """The format of a file or folder of boxes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it looks like none of ``FORMATS``.
    """
    if not place.exists():
        raise FileNotFoundError(f"{place}: no such file or folder")
    if (place / "Sentences").is_dir() and (place / "Annotations").is_dir():
        return "flickr30k"
    names = [p.name for p in place.iterdir()] if place.is_dir() else [place.name]
    if any(name.endswith((".jsonl", ".parquet")) for name in names):
        return "grit"
    if any(name.endswith(".json") for name in names):
        return "coco"
    raise ValueError(f"{place}: --format cannot be guessed; give one of {', '.join(FORMATS)}")


# -- COCO: boxes of categories, looked up in the captions ---------------------------------------------------------------------


class Mention(NamedTuple):
    """A word of the caption that names a category; ``many`` for plurals."""

    category: str
    text: str
    start: int
    many: bool


class Thing(NamedTuple):
    """One annotated object of a picture."""

    category: str
    box: Edges
    head: Edges | None


def _word_list() -> dict[str, tuple[str, bool]]:
    out: dict[str, tuple[str, bool]] = {}
    for category, words in {**COCO, "person": " ".join(PERSONS)}.items():
        for one in (word.replace("_", " ") for word in words.split()):
            out[one] = (category, one in WITHOUT_PLURAL)
            out.setdefault(plural(one), (category, True))
    return out


WORDS = _word_list()
_ANY = "|".join(re.escape(word) for word in sorted(WORDS, key=len, reverse=True))
_MENTION = re.compile(rf"(?<![\w-])(?:{_ANY})(?![\w-])", re.IGNORECASE)
_KIND_OF = re.compile(rf"\s(?:{KIND_OF.replace(' ', '|')})s?(?![\w-])", re.IGNORECASE)


def mentions(caption: str) -> list[Mention]:
    """The words that name a category of COCO; of neighbours ("baby elephant", "baseball player") the last, and no "train" of a station."""
    found = list(_MENTION.finditer(caption))
    starts = {m.start() for m in found}
    kept = [m for m in found if m.end() + 1 not in starts and not _KIND_OF.match(caption, m.end())]
    return [Mention(WORDS[m[0].lower()][0], m[0], m.start(), WORDS[m[0].lower()][1]) for m in kept]


def look_up(caption: str, things: Sequence[Thing]) -> Caption:
    """Give the boxes of each category to the words that name it, the largest first.

    A plural takes all, a singular one, so that a word that occurs twice takes two. Several words for a category ("a man and a woman") take
    a box only if it is the only one: which is whose is not annotated.
    """
    found: list[Found] = []
    dropped: Counter[str] = Counter()
    named: dict[str, list[Mention]] = defaultdict(list)
    for mention in mentions(caption):
        named[mention.category].append(mention)
    for category, words in named.items():
        boxes = sorted((t for t in things if t.category == category), key=lambda t: -area(t.box))
        if len({m.text.lower() for m in words}) > 1 and len(boxes) > 1:
            dropped["boxes of an unclear word"] += len(boxes)
            continue
        takers = [words[0]] * len(boxes) if words[0].many else words
        dropped["boxes beyond a singular"] += max(len(boxes) - len(takers), 0)
        pairs = zip(takers, boxes, strict=False)
        found += [Found(m.text, m.start, t.box, 1.0, category == "person", t.head) for m, t in pairs]
    return Caption(caption, tuple(found), dict(+dropped))


def area(box: Edges) -> float:
    """In the box's units squared, 0 for one without area."""
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def head_of(keypoints: Sequence[float], names: Sequence[str], person: Edges) -> Edges | None:
    """A square around the visible ones of nose, eyes and ears (at least two), inside the person's box.

    The proportions are ours. Both ears seen: the points' middle, 1.8 times their widest distance. One, a profile: halfway from there to the
    ear, 2.6 times. None: 3.6 times.
    """
    seen = {name: (x, y) for name, x, y, flag in zip(names, keypoints[::3], keypoints[1::3], keypoints[2::3], strict=True) if flag}
    ears = [seen[name] for name in ("left_ear", "right_ear") if name in seen]
    points = ears + [seen[name] for name in ("nose", "left_eye", "right_eye") if name in seen]
    if len(points) < 2:
        return None
    half = (3.6, 2.6, 1.8)[len(ears)] * max(math.dist(a, b) for a, b in combinations(points, 2)) / 2
    x, y = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    if len(ears) == 1:
        x, y = (x + ears[0][0]) / 2, (y + ears[0][1]) / 2
    left, top, right, bottom = person
    head = max(x - half, left), max(y - half, top), min(x + half, right), min(y + half, bottom)
    return head if area(head) else None


def _coco(place: Path, captions: str | None) -> list[Scene]:
    files = sorted(place.glob("*.json")) if place.is_dir() else [place]
    data = {file: read_json(file) for file in [*files, *([Path(captions)] if captions else [])]}
    things = _things(data)
    scenes: dict[str, Scene] = {}
    for file, content in data.items():
        if isinstance(content, dict) and "annotations" in content:
            for image, texts in coco_captions(content, str(file)):
                boxes = things.get(image["id"], [])
                frame = (float(image["width"]), float(image["height"]))
                scenes[image["file_name"]] = Scene(image["file_name"], tuple(look_up(text, boxes) for text in texts), frame)
    return list(scenes.values())


def _things(data: Mapping[Path, Any]) -> dict[Any, list[Thing]]:
    """The objects of each image, by the annotations' ids: an instance and its keypoints are one. Crowds are left out."""
    found: dict[Any, tuple[Any, Thing]] = {}
    for file, content in data.items():
        try:
            categories = {c["id"]: c for c in content.get("categories", [])}
            for a in content.get("annotations", []):
                if "bbox" in a and not a.get("iscrowd"):
                    x, y, w, h = map(float, a["bbox"])
                    category, box = categories[a["category_id"]], (x, y, x + w, y + h)
                    old = found.get(a["id"])
                    head = head_of(a["keypoints"], category["keypoints"], box) if "keypoints" in a else old[1].head if old else None
                    found[a["id"]] = (a["image_id"], Thing(category["name"], box, head))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file}: is not a COCO file ({type(error).__name__}: {error})") from error
    out: dict[Any, list[Thing]] = defaultdict(list)
    for image, thing in found.values():
        out[image].append(thing)
    return out


# -- GRIT: character spans with boxes in shares of the picture ---------------------------------------------------------------


def _grit(place: Path, captions: str | None) -> list[Scene]:
    files = sorted(p for p in place.iterdir() if p.suffix in (".jsonl", ".parquet")) if place.is_dir() else [place]
    scenes: dict[str, Scene] = {}
    for file in files:
        for where, row in _grit_rows(file):
            try:
                image = row.get("image") or row.get("file_name") or f"{row['key']}.jpg"
                spans = row["noun_chunks"] if row.get("noun_chunks") is not None else row["ref_exps"]
                caption = _spans(row["caption"], spans)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise ValueError(f"{where}: is not a row of GRIT ({type(error).__name__}: {error})") from error
            scenes[image] = Scene(image, (*(scenes[image].captions if image in scenes else ()), caption))
    return list(scenes.values())


def _grit_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.suffix != ".parquet":
        yield from read_jsonl(file)
        return
    import pyarrow.parquet

    for number, row in enumerate((r for batch in pyarrow.parquet.ParquetFile(file).iter_batches() for r in batch.to_pylist()), 1):
        yield f"{file}:{number}", row


def _spans(text: str, spans: Sequence[Sequence[float]]) -> Caption:
    """Rows (start, end, left, top, right, bottom, score) as boxes of phrases; a span that shows no words is dropped."""
    found, dropped = [], 0
    for start, end, *box, score in spans:
        first, words = int(start), text[int(start) : int(end)]
        phrase = bare(words.strip(), first + len(words) - len(words.lstrip()))
        left, top, right, bottom = map(float, box)
        if phrase.text and 0 <= first < end <= len(text):
            found.append(Found(phrase.text, phrase.start, (left, top, right, bottom), float(score), is_person(phrase.text)))
        else:
            dropped += 1
    return Caption(text, tuple(found), {"boxes without words": dropped} if dropped else {})


# -- Flickr30k Entities: marked sentences, and an XML file of boxes a picture ------------------------------------------------

_CHAIN = re.compile(r"\[/EN#(\d+)((?:/[^\s/\]]+)+) ([^\]]*)\]")


def _flickr30k(place: Path, captions: str | None) -> list[Scene]:
    scenes = []
    for file in sorted((place / "Sentences").glob("*.txt")):
        annotation = place / "Annotations" / f"{file.stem}.xml"
        if annotation.is_file():
            frame, boxes = _annotation(annotation)
            sentences = filter(str.strip, file.read_text(encoding="utf-8").splitlines())
            scenes.append(Scene(f"{file.stem}.jpg", tuple(_sentence(line(s), boxes) for s in sentences), frame))
    return scenes


def _sentence(marked: str, boxes: Mapping[str, list[Edges]]) -> Caption:
    """Plain text of "[/EN#1/people A man] sits", and the boxes of its phrases; of stacked types (/people/clothing) the first counts."""
    text, end, found = "", 0, []
    for m in _CHAIN.finditer(marked):
        text += marked[end : m.start()]
        phrase = bare(m[3], len(text))
        person = m[2].split("/")[1] == "people"
        found += [Found(phrase.text, phrase.start, box, 1.0, person) for box in boxes.get(m[1], []) if phrase.text]
        text, end = text + m[3], m.end()
    return Caption(text + marked[end:], tuple(found))


def _annotation(file: Path) -> tuple[tuple[float, float], dict[str, list[Edges]]]:
    """Size of the picture, and the boxes of each chain, none for ``nobox`` and ``scene``; pixels count from 1 there, both ends inside."""
    boxes: dict[str, list[Edges]] = defaultdict(list)
    try:
        root = ElementTree.parse(file).getroot()
        frame = float(root.findtext("size/width") or 0), float(root.findtext("size/height") or 0)
        for thing in root.iter("object"):
            if (box := thing.find("bndbox")) is not None:
                left, top, right, bottom = (float(box.findtext(k) or "nan") for k in ("xmin", "ymin", "xmax", "ymax"))
                for name in thing.iter("name"):
                    boxes[(name.text or "").strip()].append((left - 1, top - 1, right, bottom))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{file}: is not a Flickr30k Entities annotation ({error})") from error
    return frame, boxes
